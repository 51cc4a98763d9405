"""What a search looks at: what a call costs with and without its unit, and what reusing does to a run.

Letters: C calls of a run, S samples.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..core.cache_plan import COMPUTE, REUSE, CachePlan, Unit, UnitMacs
from ..core.config import Config
from ..core.errors import UnsupportedError
from ..core.reporter import Reporter
from ..core.schedule_id import ScheduleId, schedule_id
from ..runtime.cache_hooks import Values
from ..runtime.cached import CachedUnits, install_plan_, remove_plans_
from ..runtime.clock import running_scheduler
from ..runtime.compare import relative_l2
from ..runtime.macs import count_macs
from ..runtime.request import RunRequest
from ..runtime.timing import measure_in_turns
from ..runtime.trajectory import DenoiserCall, call_pipeline, capture_calls, sample

REPEATS = 5
PROBES = 6  # calls at which the answer of the final sample is measured


class CallCost(Config):
    """What the calls of one denoiser take: the profile that `--cost-profile` replays."""

    unit: str  # what is skipped, in words
    full_seconds: float  # a call that computes everything
    partial_seconds: float  # a call that skips the unit


class _FirstStep(Exception):
    """The grid is known; the run may end."""


def first_calls(pipe: Any, component: str, request: RunRequest) -> tuple[list[DenoiserCall], ScheduleId]:
    """The evaluations of the first call of a run of one sample, all guidance branches, and the grid of the run.

    Raises:
        UnsupportedError: the denoiser was not called, or the scheduler has no grid.
    """
    one = request.model_copy(update={"seeds": request.seeds[:1], "batch_size": 1})
    grids: list[ScheduleId] = []

    def stop(_: Tensor) -> None:
        if (scheduler := running_scheduler(pipe)) is not None:
            grids.append(schedule_id(scheduler))
        raise _FirstStep

    with suppress(_FirstStep):
        call_pipeline(pipe, one, [0], on_step=stop)
    captured = capture_calls(pipe, one.model_copy(update={"num_inference_steps": 2}), components=[component])
    calls = [call for call in captured if call.state is not None and call.state.call == 0]
    if not calls or not grids:
        raise UnsupportedError(
            f"{component} was not called at the first step of a run.", "A plan counts the calls of a run."
        )
    return calls, grids[0]


def count_unit_macs(denoiser: nn.Module, unit: Unit, calls: list[DenoiserCall]) -> UnitMacs:
    """Multiply-accumulates of one call for one sample, and what it saves that skips the unit."""
    with _hooked(denoiser, unit) as units:
        full = sum(count_macs(lambda call=call: call.replay(denoiser)) for call in calls)
        partial = sum(count_macs(replay) for replay in _partials(units, calls))
    return UnitMacs(full=full, units={unit.id: full - partial})


def time_calls(denoiser: nn.Module, unit: Unit, calls: list[DenoiserCall], reporter: Reporter) -> CallCost:
    """Seconds of a call with and without the unit, medians of interleaved repeats."""
    with _hooked(denoiser, unit) as units:
        partials = list(_partials(units, calls))
        actions = [lambda: [call.replay(denoiser) for call in calls], lambda: [replay() for replay in partials]]
        full, partial = measure_in_turns(actions, REPEATS, reporter)
    return CallCost(
        unit=unit.model_dump_json(),
        full_seconds=statistics.median(full),
        partial_seconds=statistics.median(partial),
    )


def feature_cost(pipe: Any, component: str, unit: Unit, request: RunRequest, reporter: Reporter) -> list[list[float]]:
    """(C, C): at [i][t] the L1 distance between what the unit gives at calls i and t, summed over samples.

    Holds the values of one batch of samples at all calls.
    """
    denoiser = pipe.components[component]
    total: Tensor | None = None
    with _hooked(denoiser, unit) as units:
        for positions in reporter.progress(list(request.batches()), "profiling"):
            calls = _capture(pipe, component, request, list(positions))
            features = [_features(units, unit, evaluations) for evaluations in calls]
            cost = torch.zeros(len(calls), len(calls), dtype=torch.float64)
            for first in range(len(calls)):
                for call in range(first + 1, len(calls)):
                    cost[first, call] = (features[call] - features[first]).abs().sum(dtype=torch.float64)
            total = cost if total is None else total + cost
    assert total is not None
    distances: list[list[float]] = total.tolist()
    return distances


def output_cost(
    pipe: Any, component: str, plan: CachePlan, request: RunRequest, reporter: Reporter, *, longest: int
) -> list[list[float]]:
    """(C, C): at [i][t] the error of the denoiser's output at call t with what the unit gave at call i (root mean
    square) times the `sensitivity` of the final sample to it. Infinite for t - i >= `longest`.

    Every evaluation has the input of the run that computes everything.
    """
    denoiser, unit = pipe.components[component], plan.units[0]
    total = torch.zeros(plan.calls, plan.calls, dtype=torch.float64)
    with _hooked(denoiser, unit) as units:
        for positions in request.batches():
            calls = _capture(pipe, component, request, list(positions))
            outputs = [[_output(call.replay(denoiser)) for call in evaluations] for evaluations in calls]
            cost = torch.full_like(total, float("inf"))
            for first in reporter.progress(range(len(calls)), "profiling"):
                reach = slice(first, first + longest)
                cost[first, reach] = _errors(units, unit, calls[reach], outputs[reach])
            total += cost * len(positions) / len(request.seeds)
    weights = sensitivity(pipe, component, plan, request, total, reporter)
    weighted: list[list[float]] = (total * torch.tensor(weights, dtype=torch.float64)).tolist()
    return weighted


def _errors(units: CachedUnits, unit: Unit, calls: list[list[DenoiserCall]], outputs: list[list[Tensor]]) -> Tensor:
    """Errors of some calls that reuse what the first of them computes: (len(calls),)."""
    squares = torch.zeros(len(calls), dtype=torch.float64)
    for branch, first in enumerate(calls[0]):
        values: Values = {}
        with units.recording(values):
            first.replay(units.denoiser)
        for number in range(1, len(calls)):
            if branch < len(calls[number]):  # guidance may end before the run does
                with units.reusing(values, [unit.id]):
                    found = _output(calls[number][branch].replay(units.denoiser))
                squares[number] += (found - outputs[number][branch]).double().pow(2).mean().cpu()
    return squares.sqrt()


def sensitivity(
    pipe: Any, component: str, plan: CachePlan, request: RunRequest, cost: Tensor, reporter: Reporter
) -> list[float]:
    """(C,): how far the final sample moves for an error of the output at each call, relative L2 over root mean square.

    Runs that reuse at one call only tell it for some calls; between them its logarithm is interpolated.

    Args:
        plan: for its unit and grid; its codes do not matter.
        cost: (C, C) errors without weights; those of reusing the call before must be finite.
    """
    calls = plan.calls
    probes = sorted({1 + round(number * (calls - 2) / (PROBES - 1)) for number in range(PROBES)})
    reference = sample(pipe, request).latents
    found: dict[int, float] = {}
    for probe in reporter.progress(probes, "probing"):
        codes = "".join(REUSE if call == probe else COMPUTE for call in range(calls))
        install_plan_(pipe, component, plan.model_copy(update={"codes": dict.fromkeys(plan.codes, codes)}))
        moved = relative_l2(reference, sample(pipe, request).latents).mean().item()
        error = float(cost[probe - 1, probe])
        if moved > 0 and error > 0:
            found[probe] = moved / error
    remove_plans_(pipe)
    return _interpolated(found, calls)


def _interpolated(found: dict[int, float], calls: int) -> list[float]:
    """Values at all calls from those at some, linear in their logarithm; ones where nothing is known."""
    known = sorted(found)
    if not known:
        return [1.0] * calls
    values = []
    for call in range(calls):
        before = max((place for place in known if place <= call), default=known[0])
        after = min((place for place in known if place >= call), default=known[-1])
        share = (call - before) / (after - before) if after > before else 0.0
        values.append(math.exp((1 - share) * math.log(found[before]) + share * math.log(found[after])))
    return values


def _capture(pipe: Any, component: str, request: RunRequest, positions: list[int]) -> list[list[DenoiserCall]]:
    """The evaluations of every call of a run of some samples."""
    seeds = tuple(request.seeds[position] for position in positions)
    batch = request.model_copy(update={"seeds": seeds, "batch_size": len(seeds)})
    calls: dict[int, list[DenoiserCall]] = {}
    for call in capture_calls(pipe, batch, components=[component]):
        if call.state is not None:
            calls.setdefault(call.state.call, []).append(call)
    return [calls[call] for call in sorted(calls)]


def _features(units: CachedUnits, unit: Unit, evaluations: list[DenoiserCall]) -> Tensor:
    """What the unit keeps at one call, all guidance branches in one row, on the CPU."""
    found: list[Tensor] = []
    for call in evaluations:
        values: Values = {}
        with units.recording(values):
            call.replay(units.denoiser)
        for path in units.layouts[unit.id].kept:
            found += [
                leaf.flatten().float().cpu() for leaf in tree_leaves(values[unit.id, path]) if torch.is_tensor(leaf)
            ]
    return torch.cat(found)


def _partials(units: CachedUnits, calls: list[DenoiserCall]) -> Iterator[Callable[[], Any]]:
    """Evaluations that skip all units, one for each call."""
    for call in calls:
        values: Values = {}
        with units.recording(values):
            call.replay(units.denoiser)

        def replay(call: DenoiserCall = call, values: Values = values) -> Any:
            with units.reusing(values, units.names):
                return call.replay(units.denoiser)

        yield replay


@contextmanager
def _hooked(denoiser: nn.Module, unit: Unit) -> Iterator[CachedUnits]:
    units = CachedUnits(denoiser, [unit])
    try:
        yield units
    finally:
        units.remove_()


def _output(result: Any) -> Tensor:
    found: Tensor = result[0]
    return found
