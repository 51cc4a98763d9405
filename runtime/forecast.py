"""Forecasts of what a unit gives, from what it gave at the last calls that computed it: TaylorSeer, Liu et al., From
Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers (2025), arXiv 2503.06923.

newton      the polynomial through the last m + 1 points, whatever their distances (Newton's divided differences)
published   D0 = v_n, D(i+1) = (D(i) - D(i) of the computed call before) / (x_n - x_(n-1)), and the forecast is
            sum of D(i) (x - x_n)^i / i!; exact for straight lines only, as the authors' program

Both are linear in the values: v_n + sum of w_j (v_j - v_n), with numbers w_j that depend on the places alone. So values
are kept as they are, in the type of the model, and the sum runs in float32. Second-order solvers come to a sigma or
timestep twice; of values at one place the newest counts, and the others have weight 0.

Letters: m order, n values that are there: v_1 ... v_n, at the places x_1 ... x_n (call, sigma or timestep).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import factorial, prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..core.cache_plan import Predictor
from .clock import RunState

Key = tuple[str, str]  # unit, module


@dataclass(frozen=True)
class Point:
    """A computed value and where it stands."""

    place: float  # x
    call: int
    value: Any


class History:
    """The last computed values of the units of one guidance branch, with the places where they stand.

    Args:
        predictors: unit and module -> how what it gives is forecast; of others nothing is kept.
    """

    def __init__(self, predictors: Mapping[Key, Predictor] | None = None) -> None:
        self.predictors = dict(predictors or {})
        self._points: dict[Key, list[Point]] = {}

    def add(self, key: Key, state: RunState, value: Any) -> None:
        """A computed value. One at the same place stays beside it, so that values and calls of a plan go together."""
        if key in self.predictors:
            point = Point(abscissa(self.predictors[key], state), state.call, value)
            self._points.setdefault(key, []).append(point)

    def forecast(self, key: Key, state: RunState) -> Any:
        """The value at a call, of the order that the values which are there allow."""
        predictor = self.predictors[key]
        place = abscissa(predictor, state)
        points = self.points(key)
        numbers = weights([point.place for point in points], place, predictor.form)
        return combined(numbers, [point.value for point in points])

    def points(self, key: Key) -> list[Point]:
        """What a forecast looks at, the newest last: all that is there at the last m + 1 places."""
        points = self._points[key]
        places = dict.fromkeys(point.place for point in reversed(points))
        last = set(list(places)[: self.predictors[key].order + 1])
        return [point for point in points if point.place in last]

    def trim(self, needed: Mapping[str, int]) -> None:
        """Keep no more values than later calls look at: unit -> how many."""
        for key in list(self._points):
            kept = needed.get(key[0], 0)
            self._points[key] = self._points[key][-kept:] if kept else []
            if not kept:
                del self._points[key]

    def clear(self) -> None:
        """Keep nothing."""
        self._points.clear()

    def count(self, key: Key) -> int:
        """At how many places there are values."""
        return len({point.place for point in self._points.get(key, ())})


def abscissa(predictor: Predictor, state: RunState) -> float:
    """x of a call; its timestep where a scheduler has no sigmas."""
    if predictor.x == "call":
        return float(state.call)
    return state.timestep if predictor.x == "timestep" or state.sigma is None else state.sigma


def weights(places: Sequence[float], place: float, form: str) -> list[float]:
    """What each value (n,) counts in the forecast at `place`; they add up to 1. Of values at one place the last counts,
    the others 0."""
    counting = [number for number, own in enumerate(places) if own not in places[number + 1 :]]
    apart = [places[number] for number in counting]
    numbers = _newton(apart, place) if form == "newton" else _published(apart, place)
    found = [0.0] * len(places)
    for number, own in zip(counting, numbers, strict=True):
        found[number] = own
    return found


def combined(numbers: Sequence[float], values: Sequence[Any]) -> Any:
    """The sum of values times numbers that add up to 1. Values are tensors or nested tuples of them, alike."""

    def sum_of(newest: Any, *older: Any) -> Any:
        if not isinstance(newest, Tensor) or not newest.is_floating_point():
            return newest
        base = total = newest.to(torch.promote_types(newest.dtype, torch.float32))
        for number, value in zip(numbers, older, strict=False):
            total = total + number * (value.to(base.dtype) - base)
        return total.to(newest.dtype)

    return tree_map(sum_of, values[-1], *values[:-1])


def _newton(places: Sequence[float], place: float) -> list[float]:
    """The polynomials that are 1 at one place and 0 at the others: Newton's polynomial, sorted by values."""
    return [prod((place - other) / (own - other) for other in places if other != own) for own in places]


def _published(places: Sequence[float], place: float) -> list[float]:
    """The recurrence, run on the shares that each value has in its factors."""
    factors: list[list[float]] = []
    for number, own in enumerate(places):
        fresh = [[float(number == other) for other in range(len(places))]]
        for older in factors:
            gap = own - places[number - 1]
            fresh.append([(new - old) / gap for new, old in zip(fresh[-1], older, strict=True)])
        factors = fresh
    distance = place - places[-1]
    powers = [distance**order / factorial(order) for order in range(len(factors))]
    by_value = zip(*factors, strict=True)  # what each value counts in every factor
    return [sum(power * share for power, share in zip(powers, shares, strict=True)) for shares in by_value]
