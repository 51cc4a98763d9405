"""Factors for the channels of what enters a convolution, so that a quiet channel is not lost beside a loud one: all
channels of an image share one activation scale, as an integer product needs it (channel equalization: Nagel et al.,
2019, arXiv 1906.04721; with inputs known: SmoothQuant, Xiao et al., 2022, arXiv 2211.10438).

What divides the inputs multiplies the weight, V = W diag(s). A candidate s is judged by the nearest values V^ and by
errors of the inputs as large as a step d of their integers makes them, or as a channel that is rounded away:

    E = sum over o, k of  (V - V^)_ok^2 E[x_k^2] / s_c^2  +  V_ok^2 min(E[d^2] / 12, E[x_k^2] / s_c^2)

with c the channel of feature k.

Letters: O rows, K = taps * C features of a row (channels innermost), C input channels, N images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.scheme import Scheme
from ..runtime.weight import to_rows
from .entry import Watch
from .grid import find_grid
from .smoothing import smoothings

STEPS = 10  # of the exponents of the candidates


class Spans(Watch):
    """Gathers the lowest and the highest value of every channel of every image that enters some convolutions; a context
    manager."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self._found: dict[str, list[Tensor]] = {}
        super().__init__((layer, self._gather(name)) for name, layer in layers.items())

    def of(self, name: str) -> Tensor | None:
        """(2, N, C) float32: lowest values, 0 at most, and highest, 0 at least; None for a layer that did not run."""
        return torch.cat(self._found[name], 1) if name in self._found else None

    def _gather(self, name: str) -> Any:
        def gather(layer: nn.Module, x: Tensor) -> None:
            low, high = x.amin((2, 3)).clamp(max=0), x.amax((2, 3)).clamp(min=0)
            self._found.setdefault(name, []).append(torch.stack([low, high]).float())

        return gather


def channel_factors(weight: Tensor, scheme: Scheme, gram: Tensor, spans: Tensor) -> Tensor | None:
    """The factors (C,) float16 with the least expected error, None where all factors being 1 is best.

    Args:
        weight: (O, C, *kernel), any float dtype.
        gram: (K, K), mean of x x^T of what the rows multiply.
        spans: (2, N, C), see `Spans`.
    """
    rows = to_rows(weight).float()
    absmax = spans.abs().amax((0, 1))
    candidates = smoothings(absmax, [rows.view(-1, len(absmax))], STEPS)
    return min(candidates, key=lambda factors: expected_error(rows, scheme, gram.diagonal(), spans, factors))


def expected_error(rows: Tensor, scheme: Scheme, power: Tensor, spans: Tensor, factors: Tensor | None) -> float:
    """E[||W x - W^ x^||^2] when weight and inputs are rounded.

    Args:
        rows: (O, K) float32.
        power: (K,), mean of x^2.
        factors: (C,); None: ones.
    """
    channels = spans.shape[2]
    factors = spans.new_ones(channels) if factors is None else factors.float()
    every = factors.repeat(rows.shape[1] // channels)  # (K,)
    moved = rows * every
    rounded = find_grid(moved, scheme.plain, search=False).round(moved)
    low, high = (spans / factors).unbind()
    if scheme.act_offset:
        step = (high.amax(1) - low.amin(1)) / (2 * scheme.act_max + 1)
    else:
        step = torch.maximum(high, -low).amax(1) / scheme.act_max
    entering = power / every.square()
    lost = entering.clamp(max=step.square().mean() / 12)
    return float(((moved - rounded).square() * entering + moved.square() * lost).sum(dtype=torch.float64))
