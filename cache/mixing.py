"""What the correction of a plan leaves over, fitted: of every call that reuses a map of few ranks from all channels to
all, beside the factor and the summand of each channel, by least squares over samples, guidance branches and space.

    minimise over A of rank r   E |A (x - E x) - R|^2 + ridge sum over j of Var(x_j) |A_j|^2,   A_j column j of A
    R = (y - E y) - scale (x - E x)

x is what the network gave at the call that is reused, y the target at the call that reuses it. Without the limit of
the rank A^T = (Cov(x, x) + ridge diag Cov(x, x))^-1 Cov(x, R); of that the part is kept that lies in the r directions
of the outputs in which A x varies most: reduced-rank regression (Izenman, 1975, Journal of Multivariate Analysis 5).
How far a call's channels are mixed, and whether at all, is told by samples that are left out of the fit: where samples
are small beside the channels, as the 16 tokens of a small transformer are, a map of all channels learns their noise.

CacheQuant (2025), arXiv 2503.01323, corrects channel by channel; that channels are mixed is ours.
Letters: C calls, N channels, r ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from ..core.cache_plan import COMPUTE, CachePlan, CorrectionId, Unit
from ..core.reporter import Reporter
from ..core.tensor_file import content_hash
from ..runtime.cache_hooks import Values
from ..runtime.cached import CachedUnits
from ..runtime.correction import DOWN, SCALE, SHIFT, UP, channel_axis
from ..runtime.plan import plan_rows
from ..runtime.request import RunRequest
from ..runtime.trajectory import DenoiserCall
from .capture import capture_batches, record
from .correct import Moments, both_hooked, value_pairs

RIDGES = (0.01, 0.1, 1.0, 10.0)  # more: less is mixed, which bends less to noise
FOLDS = 4  # parts of the samples, each of which is left out once
WIDEST = 1536  # channels; second moments of more would fill memory


@dataclass
class SecondMoments:
    """Sums over samples and space; float64, of pairs of channels float32, as there are many of them."""

    count: int
    x: Tensor  # (N,)
    y: Tensor  # (N,)
    yy: Tensor  # (N,), squares
    xx: Tensor  # (N, N)
    xy: Tensor  # (N, N), reused channel by target channel

    @classmethod
    def of(cls, reused: Tensor, target: Tensor) -> SecondMoments:
        """The moments of one pair of tensors with the same shape."""
        axis = channel_axis(reused)
        x, y = (value.detach().float().movedim(axis, -1).flatten(0, -2).cpu() for value in (reused, target))
        sums, targets, squares = (part.double().sum(0) for part in (x, y, y * y))
        return cls(len(x), sums, targets, squares, x.T @ x, x.T @ y)

    def __add__(self, other: SecondMoments) -> SecondMoments:
        return SecondMoments(
            self.count + other.count,
            self.x + other.x,
            self.y + other.y,
            self.yy + other.yy,
            self.xx + other.xx,
            self.xy + other.xy,
        )

    def of_each_channel(self) -> Moments:
        """What is known of each channel by itself."""
        squares, products = self.xx.diagonal().double(), self.xy.diagonal().double()
        return Moments(self.count, torch.stack([self.x, self.y, squares, products, self.yy]))

    def fit(self, scale: Tensor, rank: int, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
        """Down and up (r, N) and the shift (N,), float32: scale x + shift + up^T down x.

        Args:
            scale: (N,) of the correction channel by channel, which stays.
            ridge: in parts of each channel's variance.
        """
        factor, x, y = scale.double(), self.x / self.count, self.y / self.count
        covariance = self.xx.double() / self.count - x.outer(x)
        variance = covariance.diagonal().clamp(min=0)
        left = self.xy.double() / self.count - x.outer(y) - covariance * factor
        added = (
            ridge * variance + 1e-9 * variance.max() + torch.finfo(torch.float32).tiny
        )  # for channels that are still
        mixed = torch.linalg.solve(covariance + added.diag(), left)
        _, directions = torch.linalg.eigh(mixed.T @ covariance @ mixed)
        up = directions[:, -rank:].T
        down = (mixed @ up.T).T
        return down.float(), up.float(), (y - factor * x - up.T @ (down @ x)).float()

    def error(self, scale: Tensor, down: Tensor, up: Tensor, shift: Tensor) -> float:
        """Sum of the squared distances of scale x + shift + up^T down x to y."""
        mixed = scale.double().diag() + up.double().T @ down.double()  # (N, N), of a row x: mixed @ x
        b = shift.double()
        squares = (mixed @ self.xx.double() * mixed).sum() + self.yy.sum() + self.count * b @ b
        return float(squares - 2 * (mixed * self.xy.T.double()).sum() + 2 * b @ (mixed @ self.x - self.y))


def mixing_macs(denoiser: nn.Module, unit: Unit, calls: list[DenoiserCall], rank: int) -> int:
    """Multiply-accumulates of mixing the channels of what one unit gives back in one call of one sample.

    Args:
        calls: the evaluations of that call, all guidance branches.
    """
    units = CachedUnits(denoiser, [unit])
    try:
        given = record(units, calls)
    finally:
        units.remove_()
    kept = [reused for _, (reused, _) in value_pairs(units, unit.id, given, given)]
    return sum(2 * min(rank, width) * value.numel() for value in kept if (width := _width(value)) <= WIDEST)


def best_ridge(folds: Sequence[SecondMoments], rank: int) -> float | None:
    """The ridge whose maps, each fitted without one of the folds, are nearest to the targets of the folds that were
    left out; None where maps of each channel by itself are nearer, and where nothing can be left out.

    Args:
        folds: of samples that no other fold has.
    """
    if len(folds) < 2:
        return None
    errors = dict.fromkeys((None, *RIDGES), 0.0)
    for left_out in folds:
        first, *more = (fold for fold in folds if fold is not left_out)
        rest = sum(more, first)
        scale, shift = rest.of_each_channel().fit()
        none = torch.zeros(0, len(scale))
        errors[None] += left_out.error(scale, none, none, shift)
        for ridge in RIDGES:
            errors[ridge] += left_out.error(scale, *rest.fit(scale, rank, ridge))
    return min(errors, key=lambda ridge: errors[ridge])


def with_mixing(
    plan: CachePlan,
    tables: dict[str, Tensor],
    moments: Mapping[tuple[str, int], Sequence[SecondMoments]],
    rank: int,
    reporter: Reporter,
) -> tuple[CachePlan, dict[str, Tensor]]:
    """A plan with the correction of all channels together at the calls where that is nearer, see `best_ridge`, and its
    tables; as it is where there are none.

    Args:
        plan: of one unit, with the correction of what it reuses channel by channel.
        tables: of that correction.
        moments: of what it reuses, see `mixing_moments`.
        rank: r, at least 1; no more than there are channels is used.
    """
    found = {name: table.clone() for name, table in tables.items()}
    for (name, call), folds in reporter.progress(list(moments.items()), "fitting maps of channels"):
        ridge = best_ridge(folds, rank)
        if ridge is None:
            continue
        first, *more = folds
        down, up, found[f"{name}.{SHIFT}"][call] = sum(more, first).fit(tables[f"{name}.{SCALE}"][call], rank, ridge)
        for part, values in ((DOWN, down), (UP, up)):
            found.setdefault(f"{name}.{part}", torch.zeros(plan.calls, *values.shape))[call] = values
    if found.keys() == tables.keys():
        return plan, tables
    return plan.model_copy(update={"correction": CorrectionId(sha256=content_hash(found))}), found


def mixed_calls(tables: dict[str, Tensor]) -> int:
    """How many calls mix channels of what they reuse."""
    mixed = [table.any(-1).any(-1) for name, table in tables.items() if name.endswith(f".{UP}")]
    return int(torch.stack(mixed).any(0).sum()) if mixed else 0


def _width(value: Tensor) -> int:
    return value.shape[channel_axis(value)]


def _wide(tables: dict[str, Tensor]) -> set[str]:
    """Names of tensors with too many channels."""
    return {
        name.removesuffix(f".{SCALE}")
        for name, table in tables.items()
        if name.endswith(f".{SCALE}") and table.shape[1] > WIDEST
    }


def mixing_moments(
    pipe: Any,
    component: str,
    plan: CachePlan,
    tables: dict[str, Tensor],
    request: RunRequest,
    reporter: Reporter,
    reference: Any | None,
) -> dict[tuple[str, int], list[SecondMoments]]:
    """Of what each call of the plan reuses beside what is wanted there, by name of the tables and call, for each of
    `FOLDS` parts of the samples. Of tensors with more than `WIDEST` channels there are none, which is a notice.

    Args:
        pipe: without plans.
        plan: of one unit, with the correction of what it reuses channel by channel.
        tables: of that correction.
        request: the runs to profile.
        reference: the float pipeline; None: the pipeline itself gives inputs and targets.
    """
    (unit,) = (unit.id for unit in plan.units)
    if len(request.seeds) == 1:
        reporter.notice(
            f"{component}: each channel is corrected by itself; whether mixing them helps takes two samples to tell"
        )
        return {}
    found: dict[tuple[str, int], dict[int, SecondMoments]] = {}
    smaller = min(request.batch_size, -(-len(request.seeds) // FOLDS))
    request = request.model_copy(update={"batch_size": smaller})
    wide = _wide(tables)
    for name in sorted(wide):
        reporter.notice(
            f"{component}: {name} has {tables[f'{name}.{SCALE}'].shape[1]} channels, more than {WIDEST}: each is "
            "corrected by itself, they are not mixed"
        )
    with both_hooked(pipe, reference, component, plan) as (units, targets):
        rows = plan_rows(plan.codes, units.containers)
        batches = capture_batches(reference or pipe, component, request, reporter, "mixing channels")
        for fold, (_, calls) in zip(cycle(range(FOLDS)), batches, strict=False):
            kept: list[Values] = []
            for call, (row, evaluations) in enumerate(zip(rows, calls, strict=True)):
                if row.actions[unit] == COMPUTE:
                    kept = record(units, evaluations) if unit in row.needed else kept
                    continue
                for name, pair in value_pairs(units, unit, kept, record(targets, evaluations)):
                    if name not in wide:
                        own = found.setdefault((name, call), {})
                        moments = SecondMoments.of(*pair)
                        own[fold] = own[fold] + moments if fold in own else moments
    return {key: list(folds.values()) for key, folds in found.items()}
