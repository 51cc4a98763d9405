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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..core.cache_plan import COMPUTE, REUSE, CachePlan
from ..core.reporter import Reporter
from ..runtime.cache_hooks import Values
from ..runtime.cached import CachedUnits
from ..runtime.correction import SCALE, SHIFT, affine, channel_axis, table_name
from ..runtime.plan import plan_rows
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


def fit_correction(
    pipe: Any,
    component: str,
    plan: CachePlan,
    request: RunRequest,
    reporter: Reporter,
    reference: Any | None = None,
) -> dict[str, Tensor]:
    """The tables of a plan for one denoiser of a pipeline that runs without plans.

    Args:
        request: the runs to profile.
        reference: the float pipeline; None: the pipeline itself gives inputs and targets.

    Returns:
        `table_name` with `.scale` or `.shift` -> (C, N), 1 and 0 at calls that compute.
    """
    moments: dict[tuple[str, int], Moments] = {}
    with both_hooked(pipe, reference, component, plan) as (units, targets):
        rows = plan_rows(plan.codes, units.containers)
        for _, calls in capture_batches(reference or pipe, component, request, reporter, "correcting"):
            kept: dict[str, list[Values]] = {}
            for call, (row, evaluations) in enumerate(zip(rows, calls, strict=True)):
                computed = {unit for unit, action in row.actions.items() if action == COMPUTE} & row.needed.keys()
                reused = {unit for unit, action in row.actions.items() if action == REUSE}
                if computed:
                    kept |= dict.fromkeys(computed, record(units, evaluations))
                target = record(targets, evaluations) if reused else []
                for unit in reused:
                    for name, pair in _pairs(units, unit, kept[unit], target):
                        found = Moments.of(*pair)
                        moments[name, call] = moments[name, call] + found if (name, call) in moments else found
    return tables_of(moments, plan.calls)


def corrected(units: CachedUnits, unit: str, kept: list[Values], target: list[Values]) -> list[Values]:
    """What a unit gave at one call, after the map that is fitted to bring these very values to a target."""
    moments: dict[str, Moments] = {}
    for name, pair in _pairs(units, unit, kept, target):
        moments[name] = moments[name] + Moments.of(*pair) if name in moments else Moments.of(*pair)
    maps = {name: found.fit() for name, found in moments.items()}
    return [{key: _mapped(table_name(*key, 0)[:-1], value, maps) for key, value in own.items()} for own in kept]


def _mapped(stem: str, value: Any, maps: dict[str, tuple[Tensor, Tensor]]) -> Any:
    leaves, form = tree_flatten(value)
    found = [
        affine(leaf, *(part.to(leaf.device) for part in maps[f"{stem}{number}"])) if f"{stem}{number}" in maps else leaf
        for number, leaf in enumerate(leaves)
    ]
    return tree_unflatten(found, form)


def _pairs(
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
