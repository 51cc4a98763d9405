"""A cache plan against a model and a grid: whether it belongs there, what each call does, what it costs.

Letters: C calls of the plan's grid, C' calls of the grid that runs.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..core.cache_plan import COMPUTE, FORECAST, GATE, PLAN_FORMAT, REUSE, SKIPPING, CachePlan, CacheRecord
from ..core.errors import BundleError, ConfigError, ModelError
from ..core.schedule_id import NoiseGrid, nearest_calls, same_levels

NOT_EVALUATED = "-"  # a unit inside a skipped one
Containers = Mapping[str, frozenset[str]]  # unit -> the units that it lies in


@dataclass(frozen=True)
class Row:
    """What one call does with every unit."""

    actions: dict[str, str]  # unit -> C, R, F, G or -
    needed: dict[str, int]  # unit -> how many of its last computed values later calls look at; without units of none


def denoiser_sha256(denoiser: nn.Module) -> str:
    """Hash of a denoiser's config, the same for the float model and its quantized versions.

    Of fields that differ from the defaults of its class: a later diffusers has more fields, which change nothing.
    """
    config = dict(getattr(denoiser, "config", {}))
    parameters = inspect.signature(type(denoiser).__init__).parameters
    told = {
        key: json.dumps(value, default=str) for key, value in config.items()
    }  # a tuple is a list once it was stored
    usual = {key: json.dumps(one.default, default=str) for key, one in parameters.items()}
    kept = {key: value for key, value in told.items() if not key.startswith("_") and value != usual.get(key)}
    kept.pop("quantization_config", None)
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def check_record(record: CacheRecord, component: str, weights: tuple[str, ...]) -> None:
    """Refuse a plan that is not what was written, or was searched on other weights.

    Args:
        weights: hashes of the weight files that the component has, and of the float ones that it came from.

    Raises:
        BundleError: a newer format, or edited.
        ModelError: other weights.
    """
    plan = record.plan
    if plan.format > PLAN_FORMAT:
        raise BundleError(
            f"the cache plan of {component} has format {plan.format}; this dacc reads up to {PLAN_FORMAT}.",
            mend="Upgrade: pip install -U dacc-diffusion.",
        )
    if plan.sha256() != record.plan_sha256:
        raise BundleError(
            f"the cache plan of {component} was edited: its content is not what its hash says.",
            mend="Copy the bundle again, or make the plan anew with dacc search-cache.",
        )
    if plan.weights not in weights:
        raise ModelError(
            f"the cache plan of {component} was searched on other weights ({plan.weights[:12]}; here are "
            f"{' and '.join(sorted({known[:12] for known in weights}))}).",
            mend="Make a plan for this model with dacc search-cache.",
        )


def check_model(plan: CachePlan, component: str, denoiser: nn.Module) -> None:
    """Refuse a plan that was made for another kind of model.

    Raises:
        ModelError: another class, or another config.
    """
    made_for, found = plan.class_name, type(denoiser).__name__
    advice = "Make a plan for this model with dacc search-cache."
    if made_for != found:
        raise ModelError(f"the cache plan of {component} is for a {made_for}; this is a {found}.", mend=advice)
    if plan.config_sha256 != denoiser_sha256(denoiser):
        raise ModelError(f"the cache plan of {component} is for a {made_for} with another config.", mend=advice)


def codes_on(plan: CachePlan, grid: NoiseGrid, *, order: int = 1, solver: str | None = None) -> dict[str, str] | None:
    """The codes of every unit (C' letters each) for a run on `grid`; None when the plan does not serve it.

    On another grid than its own a plan computes a unit in a call when it does so anywhere in the stretch of noise
    levels that the call covers, so that between two levels no fewer calls compute than were searched; and in a call
    whose noise is back at an earlier level of the plan.

    Args:
        order: denoiser calls of one solver step. The second call of a step does not reuse what the first one computed,
            unless the plan was made for this solver.
        solver: class name of the scheduler that runs.

    Raises:
        ConfigError: another grid, and the plan's rule is "exact".
    """
    if same_levels(plan.schedule, grid):
        return dict(plan.codes)
    if plan.rule == "exact":
        raise ConfigError(
            f"the cache plan is for {plan.calls} {plan.schedule.scheduler} calls, running {len(grid.timesteps)} on "
            "another grid.",
            "Its rule is exact: it holds on its own grid only.",
            "Run the scheduler and the number of steps of the search, or use dacc.no_cache.",
        )
    if len(grid.timesteps) < plan.min_calls:
        return None
    places = nearest_calls(plan.schedule, grid)
    if plan.schedule.scheduler == solver:
        order = 1  # the search saw what its correctors reuse
    return {unit: _remapped(codes, places, order) for unit, codes in plan.codes.items()}


def _remapped(codes: str, places: list[int], order: int) -> str:
    """Codes of a run whose calls stand at `places` (C',) of the plan."""
    found = COMPUTE
    for call in range(1, len(places)):
        corrects = order > 1 and call % order and found[call - 1] == COMPUTE
        rises = places[call] < places[call - 1]  # against the run that was searched, as where an image is inverted
        passed = codes[places[call - 1] + 1 : places[call] + 1]
        found += COMPUTE if corrects or rises or COMPUTE in passed else _skipping_at(codes, places[call])
    return found


def _skipping_at(codes: str, place: int) -> str:
    """How a plan skips around one of its calls: the first such code from there on, else the last before."""
    around = (*codes[place:], *codes[place::-1])
    return next((code for code in around if code != COMPUTE), REUSE)


def plan_rows(codes: Mapping[str, str], containers: Containers, depths: Mapping[str, int] | None = None) -> list[Row]:
    """What every call does, from its codes: units inside skipped ones are not evaluated.

    Args:
        depths: unit -> how many computed values its forecasts and its gate look at; 1 for units that are not here.
    """
    depths = depths or {}
    calls = len(next(iter(codes.values())))
    actions = [
        {
            unit: NOT_EVALUATED if any(codes[outer][call] in SKIPPING for outer in containers[unit]) else own[call]
            for unit, own in codes.items()
        }
        for call in range(calls)
    ]
    rows: list[Row] = []
    needed: dict[str, int] = {}
    for current in reversed(actions):
        rows.append(Row(current, needed))
        before = {
            unit: _needed_before(action, needed.get(unit, 0), depths.get(unit, 1)) for unit, action in current.items()
        }
        needed = {unit: values for unit, values in before.items() if values}
    return rows[::-1]


def _needed_before(action: str, needed: int, depth: int) -> int:
    """How many values of a unit count before a call, when `needed` do behind it."""
    if action == COMPUTE:
        return max(needed - 1, 0)  # the call gives one itself
    if action in (FORECAST, GATE):  # the gate may compute, and may not
        return max(needed, depth)
    return max(needed, 1) if action == REUSE else needed


def computed_before(plan: CachePlan, unit: str, call: int) -> list[int]:
    """The calls whose values a forecast at `call` looks at, ascending."""
    computed = [place for place, code in enumerate(plan.codes[unit][:call]) if code == COMPUTE]
    return computed[-plan.predict[unit].order - 1 :]


def planned_macs(plan: CachePlan, containers: Containers) -> int:
    """Multiply-accumulates of a run with the plan on its own grid, for one sample; as if all gates computed."""
    return _macs(plan, plan_rows(plan.codes, containers))


def macs_ratio(plan: CachePlan, rows: Sequence[Row]) -> float:
    """Multiply-accumulates of a run that does what `rows` say over those without the plan; as if all gates computed."""
    return _macs(plan, rows) / (plan.macs.full * len(rows))


def _macs(plan: CachePlan, rows: Sequence[Row]) -> int:
    saved = (plan.macs.units[unit] for row in rows for unit, action in row.actions.items() if action in SKIPPING)
    return plan.macs.full * len(rows) - sum(saved)
