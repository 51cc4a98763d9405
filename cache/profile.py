"""What a search looks at: what a call costs with and without its unit, and what reusing does to a run.

Letters: C calls of a run, S samples.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..core.cache_plan import Unit, UnitMacs
from ..core.config import Config
from ..core.errors import UnsupportedError
from ..core.reporter import Reporter
from ..core.schedule_id import ScheduleId, schedule_id
from ..runtime.cache_hooks import Values
from ..runtime.cached import CachedUnits
from ..runtime.clock import running_scheduler
from ..runtime.macs import count_macs, counting_calls
from ..runtime.request import RunRequest
from ..runtime.timing import measure_in_turns
from ..runtime.trajectory import DenoiserCall, call_pipeline, capture_calls, sample

REPEATS = 5


class CallCost(Config):
    """What the calls of one denoiser take: the profile that `--cost-profile` replays."""

    unit: str  # what is skipped: the units as JSON, with commas between
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


def time_calls(denoiser: nn.Module, units: tuple[Unit, ...], calls: list[DenoiserCall], reporter: Reporter) -> CallCost:
    """Seconds of a call with and without all units, medians of interleaved repeats."""
    with _hooked(denoiser, units) as hooked:
        outer = [name for name in hooked.names if not hooked.containers[name]]
        partials = list(_partials(hooked, calls, outer))
        actions = [lambda: [call.replay(denoiser) for call in calls], lambda: [replay() for replay in partials]]
        device = next(denoiser.parameters()).device
        full, partial = measure_in_turns(actions, REPEATS, reporter, device=device)
    return CallCost(
        unit=told(units),
        full_seconds=statistics.median(full),
        partial_seconds=statistics.median(partial),
    )


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
