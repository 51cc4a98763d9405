"""What the correction of a plan leaves over, fitted: of every call that reuses a map of few ranks from all channels to
all, beside the factor and the summand of each channel, by least squares over samples, guidance branches and space.

    minimise over A of rank r   E |A (x - E x) - R|^2 + ridge sum over j of Var(x_j) |A_j|^2,   A_j column j of A
    R = (y - E y) - scale (x - E x)

x is what the network gave at the call that is reused, y the target at the call that reuses it. Without the limit of
the rank A^T = (Cov(x, x) + ridge diag Cov(x, x))^-1 Cov(x, R); of that the part is kept that lies in the r directions
of the outputs in which A x varies most: reduced-rank regression (Izenman, 1975, Journal of Multivariate Analysis 5).
CacheQuant (2025), arXiv 2503.01323, corrects channel by channel; that channels are mixed is ours.
Letters: C calls, N channels, r ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from .correct import both_hooked, value_pairs
from .objective import typical

RIDGES = (0.01, 0.1, 1.0)  # more: less is mixed, which bends less to noise; whole runs choose
RIDGE = 0.1  # where none are made
WIDEST = 1536  # channels; second moments of more would fill memory


@dataclass
class SecondMoments:
    """Sums over samples and space, float64."""

    count: int
    x: Tensor  # (N,)
    y: Tensor  # (N,)
    xx: Tensor  # (N, N)
    xy: Tensor  # (N, N), reused channel by target channel

    @classmethod
    def of(cls, reused: Tensor, target: Tensor) -> SecondMoments:
        """The moments of one pair of tensors with the same shape."""
        axis = channel_axis(reused)
        x, y = (value.detach().float().movedim(axis, -1).flatten(0, -2).cpu() for value in (reused, target))
        sums = (x.sum(0), y.sum(0), x.T @ x, x.T @ y)
        return cls(len(x), *(part.double() for part in sums))

    def __add__(self, other: SecondMoments) -> SecondMoments:
        return SecondMoments(
            self.count + other.count,
            self.x + other.x,
            self.y + other.y,
            self.xx + other.xx,
            self.xy + other.xy,
        )

    def fit(self, scale: Tensor, rank: int, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
        """Down and up (r, N) and the shift (N,), float32: scale x + shift + up^T down x.

        Args:
            scale: (N,) of the correction channel by channel, which stays.
            ridge: in parts of each channel's variance.
        """
        factor, x, y = scale.double(), self.x / self.count, self.y / self.count
        covariance = self.xx / self.count - x.outer(x)
        variance = covariance.diagonal().clamp(min=0)
        left = self.xy / self.count - x.outer(y) - covariance * factor
        added = (
            ridge * variance + 1e-9 * variance.max() + torch.finfo(torch.float32).tiny
        )  # for channels that are still
        mixed = torch.linalg.solve(covariance + added.diag(), left)
        _, directions = torch.linalg.eigh(mixed.T @ covariance @ mixed)
        up = directions[:, -rank:].T
        down = (mixed @ up.T).T
        return down.float(), up.float(), (y - factor * x - up.T @ (down @ x)).float()


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


def best_mixing(
    plan: CachePlan,
    tables: dict[str, Tensor],
    moments: Mapping[tuple[str, int], SecondMoments],
    rank: int,
    errors: Callable[[CachePlan, dict[str, Tensor]], Tensor] | None,
) -> tuple[CachePlan, dict[str, Tensor], float | None]:
    """A plan, its tables and the ridge: with the channels mixed as is best for whole runs of other samples than the
    moments are of, or not mixed, None, where no ridge of `RIDGES` makes these runs clearly better.

    Args:
        plan, tables, moments, rank: see `with_mixing`.
        errors: (S,) of the samples of a run; None: no runs are made, the ridge is `RIDGE`.
    """
    if errors is None:
        return *with_mixing(plan, tables, moments, rank, RIDGE), RIDGE
    best: tuple[CachePlan, dict[str, Tensor], float | None] = plan, tables, None
    unmixed = errors(plan, tables)
    least = float("inf")
    for ridge in RIDGES:
        mixed = with_mixing(plan, tables, moments, rank, ridge)
        found = errors(*mixed)
        if is_clearly_less(found, unmixed) and typical(found) < least:
            best, least = (*mixed, ridge), typical(found)
    return best


def is_clearly_less(errors: Tensor, others: Tensor) -> bool:
    """Whether what is typical falls by more than the standard error of what its logarithm falls by; both (S,)."""
    gain = others.log() - errors.log()
    if not gain.isfinite().all():
        return typical(errors) < typical(others)
    return float(gain.mean()) > float(gain.std(correction=0)) / max(len(gain) - 1, 1) ** 0.5


def with_mixing(
    plan: CachePlan,
    tables: dict[str, Tensor],
    moments: Mapping[tuple[str, int], SecondMoments],
    rank: int,
    ridge: float,
) -> tuple[CachePlan, dict[str, Tensor]]:
    """A plan with the correction of all channels together, and its tables.

    Args:
        plan: of one unit, with the correction of what it reuses channel by channel.
        tables: of that correction.
        moments: of what it reuses, see `mixing_moments`.
        rank: r, at least 1; no more than there are channels is used.
        ridge: in parts of each channel's variance.
    """
    found = {name: table.clone() for name, table in tables.items()}
    for (name, call), own in moments.items():
        down, up, found[f"{name}.{SHIFT}"][call] = own.fit(tables[f"{name}.{SCALE}"][call], rank, ridge)
        for part, values in ((DOWN, down), (UP, up)):
            found.setdefault(f"{name}.{part}", torch.zeros(plan.calls, *values.shape))[call] = values
    return plan.model_copy(update={"correction": CorrectionId(sha256=content_hash(found))}), found


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
) -> dict[tuple[str, int], SecondMoments]:
    """Of what each call of the plan reuses beside what is wanted there, by name of the tables and call. Of tensors with
    more than `WIDEST` channels there are none, which is a notice.

    Args:
        pipe: without plans.
        plan: of one unit, with the correction of what it reuses channel by channel.
        tables: of that correction.
        request: the runs to profile.
        reference: the float pipeline; None: the pipeline itself gives inputs and targets.
    """
    (unit,) = (unit.id for unit in plan.units)
    found: dict[tuple[str, int], SecondMoments] = {}
    wide = _wide(tables)
    for name in sorted(wide):
        reporter.notice(
            f"{component}: {name} has {tables[f'{name}.{SCALE}'].shape[1]} channels, more than {WIDEST}: each is "
            "corrected by itself, they are not mixed"
        )
    with both_hooked(pipe, reference, component, plan) as (units, targets):
        rows = plan_rows(plan.codes, units.containers)
        for _, calls in capture_batches(reference or pipe, component, request, reporter, "mixing channels"):
            kept: list[Values] = []
            for call, (row, evaluations) in enumerate(zip(rows, calls, strict=True)):
                if row.actions[unit] == COMPUTE:
                    kept = record(units, evaluations) if unit in row.needed else kept
                    continue
                for name, pair in value_pairs(units, unit, kept, record(targets, evaluations)):
                    if name not in wide:
                        own = SecondMoments.of(*pair)
                        found[name, call] = found[name, call] + own if (name, call) in found else own
    return found
