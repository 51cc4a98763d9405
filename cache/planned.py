"""From the calls that a method lets compute to the plan of a unit."""

from __future__ import annotations

from collections.abc import Collection
from types import ModuleType
from typing import Any

from ..core.cache_plan import COMPUTE, FORECAST, REUSE, CachePlan


def planned(blank: CachePlan, places: Collection[int], method: ModuleType, settings: Any) -> CachePlan:
    """A plan that computes its unit at some calls; at the others it is forecast where the method says how, else reused.

    Args:
        blank: a plan of one unit, for everything but its codes.
        method: a file of `methods`; its function `predictor`, if it has one, tells how to forecast.
        settings: the fields of the method.
    """
    unit = blank.units[0].id
    forecast = hasattr(method, "predictor")
    codes = "".join(COMPUTE if call in places else FORECAST if forecast else REUSE for call in range(blank.calls))
    predict = {unit: method.predictor(settings)} if forecast else {}
    return blank.model_copy(update={"codes": {unit: codes}, "predict": predict})
