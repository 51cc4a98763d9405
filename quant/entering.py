"""What enters layers that read one tensor: the largest value of each channel, the lowest of all, second moments, and
some rows of it.

Moments tell how an error of a weight grows in the outputs; rounding the inputs itself can only be judged on inputs.
Letters: K input features, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .block import Block
from .entry import Watch
from .grams import some_rows
from .layerwise import ROWS, check_finite

KEPT = 2048  # rows that are kept as they are; more: steadier, slower


@dataclass(frozen=True)
class Entering:
    """Statistics over all calls of a calibration set, float32."""

    absmax: Tensor  # (K,)
    lowest: float  # of all values
    gram: Tensor  # (K, K), mean of x x^T
    rows: Tensor  # (N, K) of x, in random order


@torch.no_grad()
def entering_of(block: Block, names: Sequence[str]) -> dict[str, Entering]:
    """What enters some linears of a unit; those that never run are left out.

    Raises:
        CalibrationError: NaN or infinity enters a layer.
    """
    calls = max(1, len(block.sightings))
    watched = {name: _Watched(-(-ROWS // calls), -(-KEPT // calls)) for name in names}
    with Watch((block.layers[name], look) for name, look in watched.items()):
        for sighting in block.sightings:
            block.run(sighting)
    return {name: watch.result(name) for name, watch in watched.items() if watch.kept}


class _Watched:
    """A hook that gathers what enters one layer.

    Args:
        counted: rows of one run that second moments are taken from.
        kept: rows of one run that are kept.
    """

    def __init__(self, counted: int, kept: int) -> None:
        self._counted, self._kept_at_once = counted, kept
        self._absmax = torch.zeros(())
        self._sums: Tensor | None = None
        self._lowest = torch.tensor(float("inf"))
        self._count = 0
        self.kept: list[Tensor] = []

    def __call__(self, layer: nn.Module, x: Tensor) -> None:
        x = x.detach().flatten(0, -2)
        self._absmax = torch.maximum(self._absmax, x.abs().amax(0).float())
        self._lowest = torch.minimum(self._lowest.to(x.device), x.amin().float())
        rows = some_rows(layer, x, self._counted, seed=self._count).float()
        if self._sums is None:
            self._sums = rows.new_zeros(rows.shape[1], rows.shape[1])
        self._sums.addmm_(rows.T, rows)
        self._count += len(rows)
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self._count))
        self.kept.append(rows[chosen[: self._kept_at_once]])

    def result(self, name: str) -> Entering:
        assert self._sums is not None
        check_finite(name, self._sums)
        rows = torch.cat(self.kept)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        return Entering(self._absmax, float(self._lowest), self._sums / self._count, rows[order])
