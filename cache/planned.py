"""Plans of a denoiser: one that computes everything, and that of the calls that a method lets compute."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any

from torch import nn

from ..core.cache_plan import COMPUTE, FORECAST, GATE, REUSE, CachePlan, Gate, Unit, UnitMacs
from ..core.schedule_id import ScheduleId
from ..runtime.plan import denoiser_sha256
from .config import SearchCacheConfig


def blank_plan(
    denoiser: nn.Module,
    units: tuple[Unit, ...],
    macs: UnitMacs,
    schedule: ScheduleId,
    weights: str,
    config: SearchCacheConfig,
) -> CachePlan:
    """A plan that computes all its units at every call.

    Args:
        schedule: the grid of the runs.
        weights: hash of the denoiser's weight files.
    """
    return CachePlan(
        class_name=type(denoiser).__name__,
        config_sha256=denoiser_sha256(denoiser),
        weights=weights,
        schedule=schedule,
        rule=config.rule,
        units=units,
        codes={unit.id: COMPUTE * len(schedule.timesteps) for unit in units},
        macs=macs,
    )


def planned(
    blank: CachePlan,
    places: Collection[int],
    method: ModuleType,
    settings: Any,
    gates: Mapping[str, Gate] | None = None,
) -> CachePlan:
    """A plan that computes its unit at some calls; at the others it is forecast where the method says how, else reused;
    with a gate, where that says so.

    Args:
        blank: a plan of one unit, for everything but its codes.
        method: a file of `methods`; its function `predictor`, if it has one, tells how to forecast, `decode_ahead` how
            many calls that reuse are decoded as one batch, `prior_noise` what share of the first sample is added again.
        settings: the fields of the method.
        gates: the gate of the unit, if it has one.
    """
    unit = blank.units[0].id
    predictor = method.predictor(settings) if hasattr(method, "predictor") else None
    skipping = GATE if gates else REUSE if predictor is None else FORECAST
    codes = "".join(COMPUTE if call in places else skipping for call in range(blank.calls))
    predict = {} if predictor is None else {unit: predictor}
    ahead = method.decode_ahead(settings) if hasattr(method, "decode_ahead") else 1
    noise = method.prior_noise(settings) if hasattr(method, "prior_noise") else 0
    update: dict[str, Any] = {"codes": {unit: codes}, "predict": predict, "gates": dict(gates or {})}
    update |= {"decode_ahead": ahead, "prior_noise": noise}
    return blank.model_copy(update=update)
