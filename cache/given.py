"""A schedule that others have found, as the plan of one denoiser."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from ..core.cache_plan import COMPUTE, ECAD_FILE, REUSE, CachePlan, CacheRecord
from ..core.config import build_config
from ..core.errors import UnsupportedError
from ..core.reporter import Reporter
from ..runtime.cache_units import containers_of, layout_of, stacks_of
from ..runtime.plan import planned_macs
from ..runtime.request import RunRequest
from .config import SearchCacheConfig
from .ecad import read_schedule, schedule_document
from .methods.ecad import EcadConfig
from .planned import blank_plan
from .profile import count_unit_macs, first_calls
from .search import Found, count_plan


def import_component(
    pipe: Any, component: str, config: SearchCacheConfig, request: RunRequest, weights: str, reporter: Reporter
) -> Found:
    """The plan of a schedule file for one denoiser of a pipeline that runs without plans.

    Raises:
        ConfigError: the file is no schedule.
        UnsupportedError: it is for another model, or another number of calls.
    """
    schedule = read_schedule(build_config(EcadConfig, **config.settings).file)
    denoiser: nn.Module = pipe.components[component]
    modules = [name for name, _ in denoiser.named_modules()]
    codes = schedule.units(stacks_of(denoiser), modules, type(denoiser).__name__)
    calls, window = first_calls(pipe, component, request)
    grid = window.grid
    if len(grid.timesteps) != schedule.steps:
        raise UnsupportedError(
            f"the schedule has {schedule.steps} steps; a run of {config.steps} steps of {grid.scheduler} makes "
            f"{len(grid.timesteps)} calls.",
            mend="Leave --steps out, or give a schedule for this solver.",
        )
    if any(own[0] == REUSE for own in codes.values()):
        reporter.notice(f"{component}: the schedule reuses at the first step, when there is nothing; it computes there")
    units = tuple(codes)
    blank = blank_plan(denoiser, units, count_unit_macs(denoiser, units, calls), grid, weights, config)
    plan = trimmed(blank.model_copy(update={"codes": {unit.id: COMPUTE + own[1:] for unit, own in codes.items()}}))
    record = CacheRecord.of(
        config.method,
        plan,
        count_plan(pipe, component, plan, window, request, reporter),
        {"calls": plan.calls, "computed": whole_calls(plan)},
    )
    return Found(record, (), {}, schedule_file(component, denoiser, plan))


def schedule_file(component: str, denoiser: nn.Module, plan: CachePlan) -> dict[str, bytes]:
    """The plan as a schedule file of ECAD, by its name in the bundle; nothing where that cannot tell it."""
    macs = planned_macs(plan, containers_of([layout_of(denoiser, unit) for unit in plan.units]))
    document = schedule_document(plan, stacks_of(denoiser), [name for name, _ in denoiser.named_modules()], macs)
    if document is None:
        return {}
    return {ECAD_FILE.format(component): (json.dumps(document, indent=1) + "\n").encode()}


def trimmed(plan: CachePlan) -> CachePlan:
    """The plan without the units that it always computes."""
    kept = tuple(unit for unit in plan.units if REUSE in plan.codes[unit.id]) or plan.units[:1]
    names = [unit.id for unit in kept]
    macs = plan.macs.model_copy(update={"units": {name: plan.macs.units[name] for name in names}})
    return plan.model_copy(update={"units": kept, "codes": {name: plan.codes[name] for name in names}, "macs": macs})


def whole_calls(plan: CachePlan) -> int:
    """How many calls compute every unit."""
    return sum(set(column) == {COMPUTE} for column in zip(*plan.codes.values(), strict=True))
