"""Cache plans at the sizes that people run: whether a run is as much faster as it has fewer multiply-accumulates, and
whether one that computes everything gives the same bits.

    python benchmarks/cache_speed.py                  # writes the tables in docs/results.md
    python benchmarks/cache_speed.py --model sd15     # times of one model, printed
    python benchmarks/cache_speed.py --exact          # the table of bits alone

The weights are random: calls compute at equal distances, and no plan is searched for. The denoiser loop of one image
runs in turns with and without each plan, from the first denoiser call to the last step of the solver.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from dacc.benchmarks.full_size import example_inputs, make_denoiser, make_pipeline_folder
from dacc.benchmarks.full_size_models import MODELS
from dacc.benchmarks.study import RESULTS, write_between
from dacc.cache.config import METHODS, SearchCacheConfig
from dacc.cache.measuring import loop_seconds
from dacc.cache.planned import blank_plan, planned
from dacc.cache.profile import count_unit_macs, counted_macs, first_calls
from dacc.cache.units import choose_unit, unit_text
from dacc.core.config import build_config
from dacc.core.machine import describe_machine
from dacc.core.pipeline import denoisers
from dacc.runtime.cached import CachedUnits
from dacc.runtime.installed import no_cache, remove_plans_
from dacc.runtime.load import DTYPES, load
from dacc.runtime.request import RunRequest
from dacc.runtime.timing import measure_in_turns

DEPTH = {"dit-xl": 8, "sd15": 2}
SHALLOW = {"dit-xl": 3, "sd15": 1, "sdxl": 1, "pixart-xl": 3, "sd35-medium": 3, "flux": 1, "wan-1.3b": 3}
SIDE = {"sd15": 32}  # of the latents: 256 pixels; of DiT-XL/2 that is its own
STEPS = 12
SHARES = (2, 3)  # one call in so many computes
METHODS_ASKED: dict[str, dict[str, Any]] = {"deepcache": {}, "taylor": {"spacing": "even"}}


def request_of(pipe: Any, model: str) -> RunRequest:
    """A run of one image without guidance."""
    side = SIDE[model] * pipe.vae_scale_factor if model in SIDE else None
    return RunRequest(seeds=(0,), batch_size=1, num_inference_steps=STEPS, guidance_scale=1.0, height=side, width=side)


def rows_of(model: str, folder: Path, dtype: torch.dtype, repeats: int) -> list[str]:
    """Rows of the table of one model."""
    pipe = load(make_pipeline_folder(model, folder, depth=DEPTH[model], dtype=dtype), device="cpu", dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    ((component, denoiser),) = denoisers(pipe).items()
    request, found = request_of(pipe, model), []
    for name, fields in METHODS_ASKED.items():
        method = METHODS.load(name)
        settings = build_config(method.CONFIG, **fields)
        unit = choose_unit(denoiser, unit_text("auto", name, method, denoiser))
        calls, window = first_calls(pipe, component, request)
        macs = count_unit_macs(denoiser, (unit,), calls)
        blank = blank_plan(denoiser, (unit,), macs, window.schedule, "", SearchCacheConfig())
        for share in SHARES:
            places = method.schedule(window.calls, window.calls // share, settings)
            window.install_(pipe, component, planned(blank, places, method, settings))
            promised, reached, seconds = promise_and_measure(pipe, component, request, repeats)
            remove_plans_(pipe)
            found.append(
                f"| {model}, {DEPTH[model]} | {name} | {len(places)} of {window.calls} | {seconds:.2f} s "
                f"| {promised:.2f} | {reached:.2f} | {reached / promised:.2f} |"
            )
            print(found[-1], flush=True)
    return found


def promise_and_measure(pipe: Any, component: str, request: RunRequest, repeats: int) -> tuple[float, float, float]:
    """What the installed plan saves by multiply-accumulates and by the clock, and the seconds of a loop without it."""

    def run(loops: list[float]) -> None:
        loops.append(loop_seconds(pipe, request))

    def run_full(loops: list[float]) -> None:
        with no_cache(pipe):
            run(loops)

    full: list[float] = []
    short: list[float] = []
    with no_cache(pipe):
        whole = counted_macs(pipe, component, request)
    promised = whole / counted_macs(pipe, component, request)
    measure_in_turns([lambda: run_full(full), lambda: run(short)], repeats)
    before, after = (statistics.median(times[1:]) for times in (full, short))  # the first runs warm up
    return promised, before / after, before


@torch.inference_mode()
def exact_row(model: str) -> str:
    """Row of one model: its call with hooks before all modules of a unit, of several kinds."""
    denoiser = make_denoiser(model, depth=SHALLOW[model], dtype=torch.float32)
    inputs = example_inputs(model, resolution=list(MODELS[model].resolutions)[-1], dtype=torch.float32)
    plain, told = denoiser(**inputs)[0], []
    for text in ("auto", "body", "output"):
        unit = choose_unit(denoiser, text)
        units = CachedUnits(denoiser, [unit])
        with units.recording({}):
            same = torch.equal(denoiser(**inputs)[0], plain)
        units.remove_()
        told.append(f"{unit.kind} of {len(units.layouts[unit.id].skipped)} modules: {'same' if same else 'OTHER'} bits")
    row = f"| {model}, {SHALLOW[model]} | {type(denoiser).__name__} | {'; '.join(told)} |"
    print(row, flush=True)
    return row


def write_exact() -> None:
    """The table of bits."""
    machine = describe_machine()
    rows = [exact_row(model) for model in SHALLOW]
    heading = (
        f"One call in float32 at full width with all values kept and none reused; {machine['processor']} "
        f"({machine['instruction_sets']}), torch {machine['torch']}, {datetime.date.today().isoformat()}."
    )
    table = ["| model, depth | class | units |", "|---|---|---|"]
    write_between(RESULTS, "cache-exact", {"full-size": "\n".join([heading, "", *table, *rows])})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", choices=DEPTH, action="append", help="default: all, into the results")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--exact", action="store_true", help="the table of bits, no times")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.model:
        write_exact()
    if options.exact:
        return
    rows = []
    for model in options.model or DEPTH:
        with tempfile.TemporaryDirectory() as temporary:
            rows += rows_of(model, Path(temporary) / model, DTYPES[options.dtype], options.repeats)
    if options.model:
        return
    machine = describe_machine()
    heading = (
        f"Denoiser loops of one image of 256 x 256 in {options.dtype} without guidance, {STEPS} steps, medians of "
        f"{options.repeats} in turns (`benchmarks/cache_speed.py`); {machine['processor']} "
        f"({machine['instruction_sets']}), {options.threads} threads, torch {machine['torch']}, "
        f"{datetime.date.today().isoformat()}."
    )
    table = [
        "| model, depth | method | calls that compute | without a plan | of MACs | speed-up | speed-up / of MACs |",
        "|---|---|---|---|---|---|---|",
    ]
    write_between(RESULTS, "cache-speed", {"full-size": "\n".join([heading, "", *table, *rows])})


if __name__ == "__main__":
    main()
