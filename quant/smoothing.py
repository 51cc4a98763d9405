"""Candidates for the factors that move outliers of the inputs of a linear into its weight (SmoothQuant: Xiao et al.,
2022, arXiv 2211.10438; two exponents as in SVDQuant: Li et al., 2024, arXiv 2411.05007):

    s_j = max |x_j|^alpha / max_i |W_ij|^beta        x / s and W diag(s) give the outputs of x and W

Letters: O output features, K input features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST = 1e4  # factor, and its inverse the smallest: within float16, and so are the inputs that are divided by them
DATA_FREE = 4.0  # likewise, where only the weight is looked at
ALWAYS = 2  # candidates at the front of the list that are more than points of the grid


def smoothings(absmax: Tensor, weights: Sequence[Tensor], steps: int) -> list[Tensor | None]:
    """No smoothing, the factors that only look at the weight, and a grid over alpha with beta = 0 and beta = 1 - alpha.

    Args:
        absmax: (K,) of the inputs.
        weights: (O, K) each, of all layers that read them.
        steps: of alpha; more: closer to the best, slower; 1: no grid.
    """
    x, w = _positive(absmax).log(), _span(weights).log()
    found: list[Tensor | None] = [None, weight_factors(weights)]
    for alpha in (step / steps for step in range(1, steps)):
        found += [_stored(alpha * x - beta * w, LARGEST) for beta in (0.0, 1 - alpha)]
    return found


def weight_factors(weights: Sequence[Tensor]) -> Tensor:
    """The factors (K,) that only look at the weights, (O, K) each, of all layers that read one tensor."""
    return _stored(-_span(weights).log(), DATA_FREE)


def smoothed_gram(gram: Tensor, smoothing: Tensor | None) -> Tensor:
    """E[x x^T] of inputs that are divided by s, (K, K)."""
    return gram if smoothing is None else gram / torch.outer(smoothing.float(), smoothing.float())


def _span(weights: Sequence[Tensor]) -> Tensor:
    """Largest weight of each channel, (K,)."""
    return _positive(torch.stack([weight.abs().amax(0).float() for weight in weights]).amax(0))


def _positive(spans: Tensor) -> Tensor:
    """Channels that are always zero have no say."""
    return torch.where(spans > 0, spans, 1.0)


def _stored(logarithm: Tensor, largest: float) -> Tensor:
    """Factors with a geometric mean of 1, as they are stored: float16, with no more digits than bfloat16 has, so that
    dividing by them is the same in both types."""
    factors = (logarithm - logarithm.mean()).exp().clamp(1 / largest, largest)
    return factors.bfloat16().half()
