"""Forecasts that are fitted: for each call and channel the weights of the last computed values, and a constant, that
come nearest to what would have been computed, by least squares over samples, guidance branches and space.

    minimise  sum of (sum over j of w_j x_j + b - y)^2 + ridge sum over j of |x_j|^2 (w_j - w0_j)^2

x_j is what the network gave at a call that computes, y the target at the call that forecasts, w0 the polynomial through
the x_j (`runtime/forecast.py`). The products of the values of all calls are summed up once; after that the weights of
any plan, whichever calls it computes, cost the solution of a few small systems.

TaylorSeer (2025), arXiv 2503.06923, continues by the polynomial; that the weights are fitted, per channel as CacheQuant
(2025), arXiv 2503.01323, corrects what is reused, is ours.
Letters: C calls, H values that a forecast looks at, N channels, S samples times space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..core.cache_plan import FORECAST, CachePlan, CorrectionId
from ..core.tensor_file import content_hash
from ..runtime.cache_hooks import Values
from ..runtime.cached import CachedUnits
from ..runtime.correction import SHIFT, WEIGHTS, channel_axis, table_name
from ..runtime.forecast import weights
from ..runtime.plan import computed_before

RIDGES = 0.1, 1e-4  # that are tried; more: nearer to the polynomial, which bends less to noise
TINY = 1e-12
AT_ONCE = 1 << 22  # values in double precision


@dataclass
class Grams:
    """Sums of products of what a unit gives at all calls, and of a constant, per channel.

    Args:
        places: x of every call, for the polynomial.
    """

    places: Sequence[float] = ()
    own: dict[str, Tensor] = field(default_factory=dict)  # name of the tables -> (N, C + 1, C + 1) float64
    with_target: dict[str, Tensor] = field(default_factory=dict)  # (N, C + 1, C)
    squares: dict[str, Tensor] = field(default_factory=dict)  # (N, C) of the targets

    def add(self, units: CachedUnits, kept: Sequence[list[Values]], targets: Sequence[list[Values]]) -> None:
        """Take in a batch.

        Args:
            kept, targets: (C,) what the one unit gives at each call, a table for each guidance branch.
        """
        ((unit, layout),) = units.layouts.items()
        for path in sorted(layout.kept):
            for branch in range(min(map(len, kept))):  # guidance may end before the run does
                given, wanted = ([tree_leaves(call[branch][unit, path]) for call in side] for side in (kept, targets))
                for number, leaf in enumerate(given[0]):
                    if torch.is_tensor(leaf) and leaf.is_floating_point():
                        rows = [[leaves[number] for leaves in side] for side in (given, wanted)]
                        self._add(table_name(unit, path, number), *rows)

    def _add(self, name: str, given: list[Tensor], wanted: list[Tensor]) -> None:
        calls, axis = len(given), channel_axis(given[0])
        x, y = ([value.movedim(axis, 0).flatten(1).cpu() for value in side] for side in (given, wanted))
        channels, size = x[0].shape
        if name not in self.own:
            self.own[name] = torch.zeros(channels, calls + 1, calls + 1, dtype=torch.float64)
            self.with_target[name] = torch.zeros(channels, calls + 1, calls, dtype=torch.float64)
            self.squares[name] = torch.zeros(channels, calls, dtype=torch.float64)
        step = max(1, AT_ONCE // (calls * size))
        for first in range(0, channels, step):
            part = slice(first, first + step)
            one, other = (torch.stack([value[part] for value in side], 1).double() for side in (x, y))
            one = torch.cat([one, torch.ones_like(one[:, :1])], 1)
            self.own[name][part] += one @ one.mT
            self.with_target[name][part] += one @ other.mT
            self.squares[name][part] += other.square().sum(-1)

    def tables(self, plan: CachePlan, ridge: float) -> dict[str, Tensor]:
        """The fitted weights of a plan of the unit, by name with `.weights`: (C, H, N), and `.shift`: (C, N).

        They are 0 at calls that compute.
        """
        ((unit, codes),) = plan.codes.items()
        forecast = [call for call, code in enumerate(codes) if code == FORECAST]
        found: dict[str, Tensor] = {}
        for name, own in self.own.items():
            most, channels = plan.predict[unit].order + 1, len(own)
            rows, shift = torch.zeros(plan.calls, most, channels), torch.zeros(plan.calls, channels)
            for call in forecast:
                history = computed_before(plan, unit, call)
                fitted = self._fit(name, history, call, plan.predict[unit].form, ridge)
                rows[call, most - len(history) :], shift[call] = fitted[:, :-1].T, fitted[:, -1]
            found |= {f"{name}.{WEIGHTS}": rows, f"{name}.{SHIFT}": shift}
        return found

    def _fit(self, name: str, history: list[int], call: int, form: str, ridge: float) -> Tensor:
        """(N, H + 1): weights and the constant."""
        places = [*history, self.own[name].shape[1] - 1]
        products = self.own[name][:, places][:, :, places]
        polynomial = weights([self.places[one] for one in history], self.places[call], form)
        start = torch.tensor([*polynomial, 0.0], dtype=torch.float64)
        left = self.with_target[name][:, places, call] - products @ start
        sizes = products.diagonal(dim1=1, dim2=2)
        pull = ridge * sizes + TINY * sizes.amax(1, keepdim=True) + TINY
        return start + torch.linalg.solve(products + torch.diag_embed(pull), left)


class FittedCost:
    """What a forecast costs that is fitted, one weight for all channels: as `forecast_cost.ForecastCost` is called.

    Args:
        grams: over calls.
        worth: (C,) of an error at each call.
    """

    def __init__(self, grams: Grams, worth: Sequence[float]) -> None:
        calls = len(worth)
        self._own = _together(grams.own)[:calls, :calls].numpy()
        self._with_target = _together(grams.with_target)[:calls].numpy()
        self._squares = _together(grams.squares).numpy()
        self._worth = numpy.asarray(worth)
        self._known: dict[tuple[int, ...], list[float]] = {}

    def __call__(self, history: tuple[int, ...], call: int) -> float:
        if history not in self._known:
            self._known[history] = self._costs(list(history))
        return self._known[history][call]

    def _costs(self, history: list[int]) -> list[float]:
        """(C,) of forecasts of each call from the same computed ones."""
        products, targets = self._own[numpy.ix_(history, history)], self._with_target[history]
        pull = numpy.diag(RIDGES[-1] * products.diagonal() + TINY)
        found = numpy.linalg.solve(products + pull, targets)
        left = self._squares - 2 * (found * targets).sum(0) + (found * (products @ found)).sum(0)
        costs: list[float] = (self._worth * numpy.sqrt(left.clip(min=0))).tolist()
        return costs


def _together(tables: dict[str, Tensor]) -> Tensor:
    """Of all tensors and channels."""
    return torch.stack([table.sum(0) for table in tables.values()]).sum(0)


def fitted_plan(plan: CachePlan, grams: Grams, ridge: float) -> tuple[CachePlan, dict[str, Tensor]]:
    """A plan with the fitted weights of its forecasts, and these."""
    tables = grams.tables(plan, ridge)
    return plan.model_copy(update={"correction": CorrectionId(sha256=content_hash(tables))}), tables
