"""What a search looks at: what a call costs with and without its unit, and what reusing does to a run.

Letters: C calls of a run, S samples.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from torch import nn

from ..core.cache_plan import Unit, UnitMacs
from ..core.config import Config
from ..core.errors import UnsupportedError
from ..core.pipeline import denoisers
from ..core.reporter import Reporter
from ..core.schedule_id import ScheduleId, schedule_id
from ..runtime.cache_hooks import Values
from ..runtime.cached import CachedUnits
from ..runtime.clock import running_scheduler
from ..runtime.clockwork import attach_clock
from ..runtime.macs import count_macs, counting_calls
from ..runtime.request import RunRequest
from ..runtime.timing import measure_in_turns
from ..runtime.trajectory import PROBE_STEPS, DenoiserCall, call_pipeline, capture_calls, sample
from .measuring import loop_seconds
from .window import Window

REPEATS = 5
LOOPS, LOOP_STEPS = 3, 8  # short runs that tell what is done between calls


class CallCost(Config):
    """What the calls of one denoiser take: the profile that `--cost-profile` replays."""

    unit: str  # what is skipped: the units as JSON, with commas between
    full_seconds: float  # a call that computes everything, with the work of the run up to the next one
    partial_seconds: float  # a call that skips the unit, likewise


class _FirstCall(Exception):
    """The grid is known; the run may end."""


def first_calls(pipe: Any, component: str, request: RunRequest) -> tuple[list[DenoiserCall], Window]:
    """The evaluations of a denoiser's first call in a run of one sample, all guidance branches, and its window.

    Raises:
        UnsupportedError: the denoiser is not called, or not in one stretch, or the scheduler has no grid.
    """
    one = request.model_copy(update={"seeds": request.seeds[:1], "batch_size": 1})
    grid = _grid(pipe, component, one)
    alone = len(denoisers(pipe)) == 1  # and then called at every step; with others only a whole run tells
    probe = one.model_copy(update={"num_inference_steps": PROBE_STEPS}) if alone else one
    calls: dict[int, list[DenoiserCall]] = {}
    for call in capture_calls(pipe, probe, components=[component]):
        if call.state is not None:
            calls.setdefault(call.state.call, []).append(call)
    numbers = sorted(calls)
    if not numbers or grid is None:
        raise UnsupportedError(
            f"{component} is not called in a run of {one.num_inference_steps} steps.",
            "A plan counts the calls of a run.",
            "Take more --steps, or choose another model with --component.",
        )
    if numbers != list(range(numbers[0], numbers[-1] + 1)):
        raise UnsupportedError(
            f"{component} is called at calls {', '.join(map(str, numbers))} of a run.",
            "A plan is for calls in one stretch.",
            "Choose another model with --component.",
        )
    count = len(grid.timesteps) if alone else len(numbers)
    return calls[numbers[0]], Window(grid, numbers[0], count)


def _grid(pipe: Any, component: str, request: RunRequest) -> ScheduleId | None:
    """The grid of the run in which a denoiser is first called; None where it is not."""
    grids: list[ScheduleId] = []

    def stop(*_: Any) -> None:
        if (scheduler := running_scheduler(pipe)) is not None:
            grids.append(schedule_id(scheduler))
        raise _FirstCall

    attach_clock(pipe)
    handle = pipe.components[component].register_forward_pre_hook(stop)
    try:
        with suppress(_FirstCall):
            call_pipeline(pipe, request, [0], on_step=lambda _: None)
    finally:
        handle.remove()
    return grids[0] if grids else None


def count_unit_macs(denoiser: nn.Module, units: tuple[Unit, ...], calls: list[DenoiserCall]) -> UnitMacs:
    """Multiply-accumulates of one call for one sample, and what it saves that skips each unit alone."""
    with _hooked(denoiser, units) as hooked:
        full = sum(count_macs(partial(call.replay, denoiser)) for call in calls)
        left = {unit.id: sum(count_macs(replay) for replay in _partials(hooked, calls, [unit.id])) for unit in units}
    return UnitMacs(full=full, units={name: full - some for name, some in left.items()})


def counted_macs(pipe: Any, component: str, request: RunRequest) -> int:
    """Multiply-accumulates of all calls of a denoiser while a request runs, as it is installed."""
    with counting_calls(pipe.components[component]) as total:
        sample(pipe, request)
    return total.macs


def time_calls(
    denoiser: nn.Module,
    units: tuple[Unit, ...],
    calls: list[DenoiserCall],
    reporter: Reporter,
    pipe: Any,
    request: RunRequest,
) -> CallCost:
    """Seconds of a call with and without all units, medians of interleaved repeats, and of the work between calls.

    Args:
        calls: the evaluations of one call, all guidance branches.
        request: the run that they are of.
    """
    with _hooked(denoiser, units) as hooked:
        outer = [name for name in hooked.names if not hooked.containers[name]]
        partials = list(_partials(hooked, calls, outer))
        actions = [lambda: [call.replay(denoiser) for call in calls], lambda: [replay() for replay in partials]]
        device = next(denoiser.parameters()).device
        full, partial = map(statistics.median, measure_in_turns(actions, REPEATS, reporter, device=device))
        between = max(0.0, _seconds_per_call(pipe, hooked, calls, outer, request) - partial)
    return CallCost(unit=told(units), full_seconds=full + between, partial_seconds=partial + between)


def _seconds_per_call(
    pipe: Any, units: CachedUnits, calls: list[DenoiserCall], skipped: list[str], request: RunRequest
) -> float:
    """Of a short run whose calls all skip some units; 0 for pipelines of several denoisers, where others run too."""
    if len(denoisers(pipe)) > 1:
        return 0.0
    steps = min(request.num_inference_steps, LOOP_STEPS)
    short = request.model_copy(update={"seeds": request.seeds[:1], "batch_size": 1, "num_inference_steps": steps})
    values: Values = {}
    with units.recording(values):
        calls[0].replay(units.denoiser)
    evaluated: list[Any] = []
    handle = units.denoiser.register_forward_pre_hook(lambda *_: evaluated.append(None))
    try:
        with units.reusing(values, skipped):
            loops = [loop_seconds(pipe, short) for _ in range(LOOPS)]
    finally:
        handle.remove()
    return min(loops) * LOOPS * len(calls) / len(evaluated)


def told(units: tuple[Unit, ...]) -> str:
    """What a profile of some units says that it is of."""
    return ",".join(unit.model_dump_json() for unit in units)


def _partials(units: CachedUnits, calls: list[DenoiserCall], skipped: list[str]) -> Iterator[Callable[[], Any]]:
    """Evaluations that skip some units, of which none lies in another, one for each call."""
    for call in calls:
        values: Values = {}
        with units.recording(values):
            call.replay(units.denoiser)

        def replay(call: DenoiserCall = call, values: Values = values) -> Any:
            with units.reusing(values, skipped):
                return call.replay(units.denoiser)

        yield replay


@contextmanager
def _hooked(denoiser: nn.Module, units: tuple[Unit, ...]) -> Iterator[CachedUnits]:
    hooked = CachedUnits(denoiser, units)
    try:
        yield hooked
    finally:
        hooked.remove_()
