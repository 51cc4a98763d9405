"""The correction of a plan, fitted: per denoiser call and channel the affine map from what is reused to what would have
been computed, by least squares over samples, guidance branches and space.

The first part of the decoupled error correction of CacheQuant: Accelerating Diffusion Models Jointly with Quantization
and Caching (2025), arXiv 2503.01323. The paper corrects the errors of reuse and of rounding one after the other, the
second at the outputs of the layers that read the value (`correct_layers.py`). Here the target is what the float network
computes, where it is known, so that this map takes in what rounding did to the reused value itself.

    scale = cov(x, y) / var(x),    shift = mean(y) - scale mean(x)

x is what the network gave at the call that is reused, y the target at the call that reuses it.
Letters: C calls, N channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..core.cache_plan import COMPUTE, REUSE, CachePlan, CorrectionId
from ..core.reporter import Reporter
from ..core.tensor_file import content_hash
from ..runtime.cache_hooks import Values
from ..runtime.cached import CachedUnits
from ..runtime.correction import SCALE, SHIFT, affine, channel_axis, table_name
from ..runtime.request import RunRequest
from .capture import capture_batches, record


@dataclass
class Moments:
    """Sums over samples and space, per channel, float64."""

    count: int
    sums: Tensor  # (5, N): x, y, x x, x y, y y

    @classmethod
    def of(cls, reused: Tensor, target: Tensor) -> Moments:
        """The moments of one pair of tensors with the same shape."""
        axis = channel_axis(reused)
        x, y = (value.detach().double().movedim(axis, 0).flatten(1).cpu() for value in (reused, target))
        return cls(x.shape[1], torch.stack([x.sum(1), y.sum(1), (x * x).sum(1), (x * y).sum(1), (y * y).sum(1)]))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.sums + other.sums)

    def fit(self) -> tuple[Tensor, Tensor]:
        """Scale and shift (N,), float32; 1 and 0 for channels that they would not bring nearer to the target."""
        x, y, xx, xy, _ = self.sums / self.count
        variance, covariance = xx - x * x, xy - x * y
        known = variance > 1e-12 * xx
        scale = torch.where(known, covariance / torch.where(known, variance, 1.0), 1.0).float()
        shift = (y - scale.double() * x).float()
        better = self.error(scale, shift) < self.error(torch.ones_like(scale), torch.zeros_like(shift))
        return torch.where(better, scale, 1.0), torch.where(better, shift, 0.0)

    def error(self, scale: Tensor, shift: Tensor) -> Tensor:
        """Mean squared distance of scale x + shift to y: (N,)."""
        a, b = scale.double(), shift.double()
        x, y, xx, xy, yy = self.sums / self.count
        return yy - 2 * a * xy - 2 * b * y + a * a * xx + 2 * a * b * x + b * b


@dataclass
class Pairs:
    """The moments of what a unit gives at one call beside what is wanted at a later one, for every pair of calls: with
    them the correction of any plan of the unit is known, whichever calls it computes."""

    moments: dict[tuple[str, int, int], Moments] = field(default_factory=dict)  # name of the tables, from, to

    def add(
        self, units: CachedUnits, unit: str, calls: tuple[int, int], kept: list[Values], target: list[Values]
    ) -> dict[str, Moments]:
        """Take in one pair of calls of a batch; the moments of this batch alone, by name of the tables."""
        found: dict[str, Moments] = {}
        for name, pair in value_pairs(units, unit, kept, target):
            found[name] = found[name] + Moments.of(*pair) if name in found else Moments.of(*pair)
        for name, own in found.items():
            known = self.moments.get((name, *calls))
            self.moments[(name, *calls)] = own if known is None else known + own
        return found

    def tables(self, plan: CachePlan) -> dict[str, Tensor]:
        """The correction of a plan of the unit: `table_name` with `.scale` or `.shift` -> (C, N), 1 and 0 at calls that
        compute."""
        (codes,) = plan.codes.values()
        first = {call: codes.rindex(COMPUTE, 0, call) for call, code in enumerate(codes) if code == REUSE}
        return tables_of(
            {(name, to): found for (name, came, to), found in self.moments.items() if first.get(to) == came}, plan.calls
        )


def corrected_plan(plan: CachePlan, pairs: Pairs) -> tuple[CachePlan, dict[str, Tensor]]:
    """A plan with the correction of what it reuses, and its tables; as it is where it reuses nothing."""
    tables = pairs.tables(plan)
    if not tables:
        return plan, {}
    return plan.model_copy(update={"correction": CorrectionId(sha256=content_hash(tables))}), tables


def mapped(kept: list[Values], moments: dict[str, Moments]) -> list[Values]:
    """What a unit gave at one call, after the map that is fitted to some moments, by name of the tables."""
    maps = {name: found.fit() for name, found in moments.items()}
    return [{key: _mapped(table_name(*key, 0)[:-1], value, maps) for key, value in own.items()} for own in kept]


def _mapped(stem: str, value: Any, maps: dict[str, tuple[Tensor, Tensor]]) -> Any:
    leaves, form = tree_flatten(value)
    found = [
        affine(leaf, *(part.to(leaf.device) for part in maps[f"{stem}{number}"])) if f"{stem}{number}" in maps else leaf
        for number, leaf in enumerate(leaves)
    ]
    return tree_unflatten(found, form)


def value_pairs(
    units: CachedUnits, unit: str, kept: list[Values], target: list[Values]
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Name of the tables -> (reused, target) of every tensor that a unit keeps, branch by branch."""
    for path in sorted(units.layouts[unit].kept):
        for own, wanted in zip(kept, target, strict=False):  # guidance may end before the run does
            leaves = zip(tree_leaves(own[unit, path]), tree_leaves(wanted[unit, path]), strict=True)
            for number, (reused, computed) in enumerate(leaves):
                if torch.is_tensor(reused) and reused.is_floating_point():
                    yield table_name(unit, path, number), (reused, computed)


def tables_of(moments: dict[tuple[str, int], Moments], calls: int) -> dict[str, Tensor]:
    """The fitted maps, by name with `.scale` and `.shift`: (C, N), 1 and 0 where nothing was seen."""
    tables: dict[str, Tensor] = {}
    for (name, call), found in moments.items():
        channels = found.sums.shape[1]
        scale, shift = found.fit()
        tables.setdefault(f"{name}.{SCALE}", torch.ones(calls, channels))[call] = scale
        tables.setdefault(f"{name}.{SHIFT}", torch.zeros(calls, channels))[call] = shift
    return tables


def profile_pairs(
    pipe: Any, component: str, plan: CachePlan, request: RunRequest, reporter: Reporter, reference: Any | None = None
) -> Pairs:
    """The moments of all pairs of calls of runs that compute everything. Holds the values of a batch at all calls.

    Args:
        plan: for its one unit and its grid.
        request: the runs to profile.
        reference: the float pipeline; None: the pipeline itself gives inputs and targets.
    """
    (unit,) = (unit.id for unit in plan.units)
    pairs = Pairs()
    with both_hooked(pipe, reference, component, plan) as (units, targets):
        for _, calls in capture_batches(reference or pipe, component, request, reporter, "correcting"):
            kept = [record(units, evaluations) for evaluations in calls]
            wanted = kept if reference is None else [record(targets, evaluations) for evaluations in calls]
            for first, to in combinations(range(len(calls)), 2):
                pairs.add(units, unit, (first, to), kept[first], wanted[to])
    return pairs


@contextmanager
def both_hooked(
    pipe: Any, reference: Any | None, component: str, plan: CachePlan
) -> Iterator[tuple[CachedUnits, CachedUnits]]:
    """The units of a denoiser and of the one that gives the targets, which may be the same."""
    with ExitStack() as stack:

        def hooked(denoiser: nn.Module) -> CachedUnits:
            units = CachedUnits(denoiser, plan.units)
            stack.callback(units.remove_)
            return units

        own = hooked(pipe.components[component])
        yield own, own if reference is None else hooked(reference.components[component])
