"""What installed plans do: to the seconds of a run, and to its images."""

from __future__ import annotations

import statistics
from contextlib import nullcontext
from typing import Any

from ..core.errors import UnsupportedError
from ..core.manifest import Effect
from ..core.pipeline import denoisers
from ..core.reporter import Reporter
from ..core.seeds import seed_stream
from ..runtime.clock import current_run
from ..runtime.compare import compare
from ..runtime.installed import no_cache
from ..runtime.request import RunRequest
from ..runtime.timing import measure_in_turns, now
from ..runtime.trajectory import call_pipeline, sample

KEPT_PROMISE = 0.95  # of the speed-up that was asked for must be measured
TIMED_RUNS = 3
EFFECT_SEEDS = 4
BUDGET_SECONDS = 60.0  # for the comparison, and for times that nothing was promised of
TOO_LONG = f"it would take more than {BUDGET_SECONDS:.0f} s"


def measure_plan(pipe: Any, request: RunRequest, seconds_per_run: float, seed: int, reporter: Reporter) -> Effect:
    """Difference of a run with the installed plans to one without, from the same noise."""
    expected = 2 * EFFECT_SEEDS * seconds_per_run
    if expected > BUDGET_SECONDS:
        reporter.say(f"measuring would take about {expected:.0f} s")
        reporter.notice(f"the effect on images was not measured: {TOO_LONG}")
        return Effect(not_measured=TOO_LONG)
    seeds = seed_stream("effect", seed, EFFECT_SEEDS)
    runs = request.model_copy(update={"seeds": seeds, "batch_size": EFFECT_SEEDS})
    with reporter.stage("comparing with the source without plan"):
        with no_cache(pipe):
            reference = sample(pipe, runs)
        return compare(reference, sample(pipe, runs), steps=request.num_inference_steps)


def measure_speedup(pipe: Any, request: RunRequest, reporter: Reporter, *, needed: bool) -> tuple[float | None, float]:
    """Seconds of the denoiser loop without the plans over those with them, and seconds without: medians in turns.

    Args:
        needed: however long it takes; else the first is None, with a notice, where that would be long.
    """
    one = request.model_copy(update={"seeds": request.seeds[:1], "batch_size": 1})
    if not needed:
        with no_cache(pipe):
            seconds = loop_seconds(pipe, one)
        if 2 * (TIMED_RUNS + 1) * seconds > BUDGET_SECONDS:
            reporter.notice(f"the speed-up was not measured: {TOO_LONG}")
            return None, seconds
    loops: dict[bool, list[float]] = {True: [], False: []}

    def run(without: bool) -> None:
        with no_cache(pipe) if without else nullcontext():
            loops[without].append(loop_seconds(pipe, one))

    measure_in_turns([lambda: run(True), lambda: run(False)], TIMED_RUNS, reporter, device=pipe.device)
    full, cached = (statistics.median(loops[without][1:]) for without in (True, False))  # the first runs warm up
    return full / cached, full


def check_promise(asked: float, measured: float) -> None:
    """Refuse a plan that is slower than was asked for.

    Raises:
        UnsupportedError: less than 0.95 of the speed-up was measured.
    """
    if measured < KEPT_PROMISE * asked:
        raise UnsupportedError(
            f"a speed-up of {asked:g} was asked for and {measured:.2f} measured.",
            "The time of a call was measured before; a busy machine, or the sums of forecasts, make the difference.",
            "Try again on a quiet machine, ask for more, or use --macs-ratio.",
        )


def loop_seconds(pipe: Any, request: RunRequest) -> float:
    """From the first call of a denoiser to the last step of the solver."""
    marks: list[float] = []

    def begin(*_: Any) -> None:
        if not marks:
            marks.append(now(pipe.device))

    def end(_: Any) -> None:
        state = current_run()
        if state is None or state.call == state.calls - 1:  # waiting at every step would slow an accelerator down
            marks.append(now(pipe.device))

    handles = [found.register_forward_pre_hook(begin, prepend=True) for found in denoisers(pipe).values()]
    try:
        call_pipeline(pipe, request, [0], on_step=end)
    finally:
        for handle in handles:
            handle.remove()
    return marks[-1] - marks[0]
