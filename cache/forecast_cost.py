"""What it does to a run to forecast what a unit gives, wherever the calls are that compute.

A forecast is sum of w_i v_i over computed calls i with weights that add up to 1 (`runtime/forecast.py`), so that the
distances between what the unit gives at all calls tell the error of every forecast, and nothing more is evaluated:

    ||sum of w_i v_i - v_t||^2 = sum over i of w_i d_it - 1/2 sum over i, j of w_i w_j d_ij,    d_ij = ||v_i - v_j||^2

with d_it to the target where that is another one. Its worth at call t, what it moves the final sample for its size, is
measured by reusing the call before.

Letters: C calls of a run, N values of a unit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.cache_plan import CachePlan, Predictor
from ..core.reporter import Reporter
from ..runtime.cache_hooks import Values
from ..runtime.cached import CachedUnits
from ..runtime.forecast import abscissa, weights
from ..runtime.request import RunRequest
from .capture import capture_batches, record
from .correct import both_hooked
from .cost import errors_of_reuse, flat_values, sensitivity
from .fitting import FittedCost, Grams
from .window import Window

AT_ONCE = 1 << 18  # values of each call in double precision


@dataclass(frozen=True)
class ForecastCost:
    """What a forecast costs, called with the computed calls that it looks at and the call that it is for.

    Args:
        distances: (C, C), d.
        aims: (C, C), squared distances of what the unit gives at call i to the target at call t.
        places: x of every call.
        worth: of an error at each call.
        form: of the predictor.
        grams: what forecasts can be fitted with.
    """

    distances: list[list[float]]
    aims: list[list[float]]
    places: list[float]
    worth: list[float]
    form: str
    grams: Grams | None = None

    @property
    def fitted(self) -> FittedCost | None:
        """The same of forecasts that are fitted, where that is known."""
        return FittedCost(self.grams, self.worth) if self.grams else None

    def __call__(self, history: tuple[int, ...], call: int) -> float:
        return self.worth[call] * math.sqrt(self.squared_error(history, call))

    def squared_error(self, history: tuple[int, ...], call: int) -> float:
        """||sum of w_i v_i - v_t||^2, the sum over `history` and t the call."""
        numbers = weights([self.places[one] for one in history], self.places[call], self.form)
        known = list(zip(numbers, history, strict=True))
        linear = sum(number * self.aims[one][call] for number, one in known)
        among = sum(number * other * self.distances[one][two] for number, one in known for other, two in known)
        return max(linear - among / 2, 0.0)


def forecast_cost(
    pipe: Any,
    component: str,
    plan: CachePlan,
    window: Window,
    request: RunRequest,
    predictor: Predictor,
    reporter: Reporter,
    *,
    fit: bool = False,
    reference: Any | None = None,
) -> ForecastCost:
    """Profile the unit of a plan on runs that compute everything. Holds the values of one batch at all calls.

    Args:
        plan: for its one unit and its grid.
        fit: whether forecasts are fitted.
        reference: the float pipeline, whose runs and values are then the targets.
    """
    (unit,) = plan.units
    distances, aims = (torch.zeros(plan.calls, plan.calls, dtype=torch.float64) for _ in range(2))
    errors = torch.zeros(plan.calls, dtype=torch.float64)
    grams = Grams()
    with both_hooked(pipe, reference, component, plan) as (units, targets):
        for share, calls in capture_batches(reference or pipe, component, request, reporter, "profiling"):
            kept = [record(units, evaluations) for evaluations in calls]
            goals = kept if reference is None else [record(targets, evaluations) for evaluations in calls]
            values, wanted = _flat(units, unit.id, kept), _flat(targets, unit.id, goals)
            squares = squared_distances(torch.cat([values, wanted]) if reference else values)
            distances += squares[: plan.calls, : plan.calls]
            aims += squares[: plan.calls, -plan.calls :]
            errors += share * torch.tensor(errors_of_reuse(units, calls, kept), dtype=torch.float64)
            grams.places = [abscissa(predictor, evaluations[0].state) for evaluations in calls if evaluations[0].state]
            if fit:
                grams.add(units, kept, goals)
    moved = [math.sqrt(float(distances[call - 1, call])) if call else 0.0 for call in range(plan.calls)]
    answers = sensitivity(pipe, component, plan, window, request, errors.tolist(), reporter)
    worth = [answers[call] * float(errors[call]) / far if far else 0.0 for call, far in enumerate(moved)]
    return ForecastCost(
        distances.tolist(), aims.tolist(), list(grams.places), worth, predictor.form, grams if fit else None
    )


def _flat(units: CachedUnits, unit: str, kept: list[list[Values]]) -> Tensor:
    """(C, N) what the unit gives at each call."""
    values = [flat_values(units, recorded)[unit] for recorded in kept]
    shortest = min(map(len, values))  # guidance may end before the run does
    return torch.stack([one[:shortest] for one in values])


def squared_distances(values: Tensor) -> Tensor:
    """d of what a unit gives at each call: (C, N) -> (C, C) float64."""
    total = torch.zeros(len(values), len(values), dtype=torch.float64)
    for part in values.split(AT_ONCE, dim=1):
        about = (part - part.mean(0)).double()  # distances stay, and less is lost when large squares are subtracted
        total += about @ about.T
    squares = total.diagonal()
    return (squares[:, None] + squares - 2 * total).clamp(min=0)
