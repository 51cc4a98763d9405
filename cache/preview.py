"""`dacc search-cache --dry-run`: what a search would be about, and what its target allows; nothing is written.

Letters: C calls of a run, K calls that compute everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..core.cache_plan import CacheRecord, Unit, UnitMacs
from ..core.config import Config, Document, build_config
from ..core.errors import ConfigError, UnsupportedError
from ..core.reporter import Reporter
from ..core.source import Source
from ..runtime.installed import remove_plans_
from ..runtime.load import load_source
from ..runtime.request import RunRequest, tell_of_prompts
from .api import Job, check_calibration, prepare
from .config import AUTO, METHODS, TRIED, SearchCacheConfig, unit_name
from .evolution import check_installed, limit_of
from .files import parse_costs
from .given import import_component
from .profile import CallCost
from .run import request_of
from .scene import Aim, aim_of, scene_of
from .units import choose_units, unit_text


class MethodPreview(Config):
    """What one method would have to work with."""

    calls: int  # C
    macs: int  # of a call, for one sample and all guidance branches
    units: dict[str, float]  # what would be reused -> the share of a call's multiply-accumulates that skipping it saves
    computed: float | None = None  # K; None where units compute at different calls
    macs_ratio: float  # of a run that meets the target; of `evolve` the most that one may have
    cost: CallCost | None = None  # in seconds, where the target is in them


class ComponentPreview(Config):
    """What a search would look at in one denoiser."""

    class_name: str
    methods: dict[str, MethodPreview]
    out_of_reach: dict[str, str]  # methods that `auto` would leave out -> why


class Preview(Document):
    """The whole request."""

    source: str
    speedup: float | None
    target_macs_ratio: float | None
    steps: int
    components: dict[str, ComponentPreview]


def preview_search(
    source: str | Path | Source | None,
    config: SearchCacheConfig,
    *,
    calib: str | Path | None = None,
    device: str = "auto",
    cost_profile: str | Path | None = None,
    reference: str | Path | Source | None = None,
    reporter: Reporter,
) -> Preview:
    """Count, time and divide as `search_cache` would before it searches, and write nothing.

    Raises:
        DaccError: as `search_cache` would before it searches.
    """
    job = prepare(source, config, reporter, cost_profile, reference, calib)
    check_calibration(job, reporter)
    pipe: Any = load_source(job.source, device=device, dtype=job.config.dtype, cached=False, reporter=reporter)
    request = request_of(job)
    tell_of_prompts(pipe, request, reporter)
    assert job.config.steps is not None
    return Preview(
        source=job.source.identity,
        speedup=job.config.speedup,
        target_macs_ratio=job.config.macs_ratio,
        steps=job.config.steps,
        components={name: _preview_component(pipe, name, job, request, reporter) for name in job.components},
    )


def _preview_component(
    pipe: Any, component: str, job: Job, request: RunRequest, reporter: Reporter
) -> ComponentPreview:
    found: dict[str, MethodPreview] = {}
    refused: dict[str, str] = {}
    costs: dict[str, tuple[CallCost, ...]] = {}  # of the units that methods treat: calls of each are timed once
    names = TRIED if job.config.method == AUTO else (job.config.method,)
    for name in names:
        config, method = job.config.model_copy(update={"method": name}), METHODS.load(name)
        unit = unit_text(config.unit, name, method, pipe.components[component])
        known = parse_costs(job.costs, component) or costs.get(unit, ())
        weights = job.hashes[component]
        try:
            found[name] = _preview_method(pipe, component, config, method, weights, request, reporter, known)
        except (ConfigError, UnsupportedError) as error:
            if name == names[-1] and not found:
                raise
            refused[name] = error.what
            continue
        if (cost := found[name].cost) is not None:
            costs[unit] = (cost,)
    return ComponentPreview(class_name=type(pipe.components[component]).__name__, methods=found, out_of_reach=refused)


def _preview_method(
    pipe: Any,
    component: str,
    config: SearchCacheConfig,
    method: ModuleType,
    weights: str,
    request: RunRequest,
    reporter: Reporter,
    known: Sequence[CallCost],
) -> MethodPreview:
    kind = getattr(method, "UNITS", "one")
    if kind == "given":
        record = import_component(pipe, component, config, request, weights, reporter).record
        remove_plans_(pipe)
        return _of_record(record)
    settings = build_config(method.CONFIG, **config.settings)
    if kind == "one":
        return _of_aim(aim_of(pipe, component, config, method, settings, request, reporter, known))
    check_installed()
    units = choose_units(pipe.components[component], config.unit)
    scene = scene_of(pipe, component, units, config, request, reporter)
    cost = scene.measured_cost(known, reporter) if config.speedup is not None else None
    return MethodPreview(
        calls=scene.window.calls,
        macs=scene.macs.full,
        units=_shares(units, scene.macs),
        macs_ratio=limit_of(config, scene, cost),
        cost=cost,
    )


def _of_aim(aim: Aim) -> MethodPreview:
    calls, macs = aim.scene.window.calls, aim.scene.macs
    skipping = 1 - (macs.units[aim.unit.id] - aim.mixing) / macs.full
    return MethodPreview(
        calls=calls,
        macs=macs.full,
        units=_shares(aim.scene.units, macs),
        computed=aim.computed,
        macs_ratio=(aim.computed + (calls - aim.computed) * skipping) / calls,
        cost=aim.cost,
    )


def _of_record(record: CacheRecord) -> MethodPreview:
    plan = record.plan
    return MethodPreview(
        calls=plan.calls,
        macs=plan.macs.full,
        units=_shares(plan.units, plan.macs),
        computed=float(record.chosen["computed"]),
        macs_ratio=record.macs_ratio,
    )


def _shares(units: Sequence[Unit], macs: UnitMacs) -> dict[str, float]:
    return {unit_name(unit): macs.units[unit.id] / macs.full for unit in units}
