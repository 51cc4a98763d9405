"""PTQ4DM: post-training quantization on inputs whose time steps lie nearer to the clean end (Shang et al., 2023, arXiv
2211.15736). Its law of time steps is the calibration strategy `ndtc`; what runs on these inputs is nearest rounding
with a search for the range:

    th = argmin over {i max|x| / 100 : i = 1..100} of mean |x - x^|^2.4,   range [-th, th]

per output channel for weights, per tensor for activations, where the ranges of batches are mixed 0.9 old + 0.1 new.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.config import Config
from ...core.scheme import Scheme
from ...runtime.weight import QuantizedWeight, to_rows
from ..grid import Grid, minmax_grid, round_codes, split_groups, stored_scale, two_level_scale
from ..ranges import NORM, Finder, Observed, Range, best_range

NEEDS: tuple[str, ...] = ()
UNIT = "layer"
ACT_MODE = "static"
CALIBRATION = "ndtc"
CANDIDATES = 100
MOMENTUM = 0.9  # of the range, from batch to batch


class PTQ4DMConfig(Config):
    """It has no fields of its own."""


CONFIG = PTQ4DMConfig


def act_search(config: PTQ4DMConfig) -> Finder:
    """How fixed activation ranges are found."""
    return mixed_range


def quantize(weight: Tensor, scheme: Scheme, config: PTQ4DMConfig) -> QuantizedWeight:
    """Quantize one weight.

    Args:
        weight: (O, *features), any float dtype.
    """
    rows = to_rows(weight).float()
    grid = _searched_grid(rows, scheme)
    return grid.pack(grid.nearest(rows), tuple(weight.shape))


def _searched_grid(rows: Tensor, scheme: Scheme) -> Grid:
    """The share of the range of every channel or group with the least error; with zero points both ends shrink."""
    groups = split_groups(rows, scheme.group_size)  # (O, G, N)
    absmax, top = groups.abs().amax(-1), 2 ** (scheme.bits - 1) - 1
    absmax = torch.where(absmax > 0, absmax, 1.0)
    best = best_zero = torch.zeros_like(absmax)
    least = torch.full_like(absmax, torch.inf)
    for step in range(1, CANDIDATES + 1):
        share = step / CANDIDATES
        if scheme.symmetric:
            scale, zero = absmax * share / top, torch.zeros_like(absmax)
        else:
            scale, zero = minmax_grid(groups * share, scheme.bits, symmetric=False)
        codes = round_codes(groups, scale, zero, scheme.code_range)
        error = ((codes - zero.unsqueeze(-1)) * scale.unsqueeze(-1) - groups).abs().pow(NORM).mean(-1)
        better = error < least
        best, best_zero = torch.where(better, scale, best), torch.where(better, zero, best_zero)
        least = torch.minimum(error, least)
    ones = torch.ones_like(best[:, :1])
    if scheme.two_level:
        row_scale, multipliers = two_level_scale(torch.where(groups.any(-1), best, 0.0))
        return Grid(scheme, row_scale, best_zero, multipliers)
    return Grid(scheme, stored_scale(best), best_zero, ones)


def mixed_range(records: list[Observed], bits: int) -> Range:
    """The range of activations: searched in every batch, mixed from batch to batch."""
    low = high = None
    for index in torch.randperm(len(records), generator=torch.Generator().manual_seed(0)).tolist():
        found = _threshold(records[index], bits)  # a set is ordered by steps, and the last batches weigh most
        low = found[0] if low is None else MOMENTUM * low + (1 - MOMENTUM) * found[0]
        high = found[1] if high is None else MOMENTUM * high + (1 - MOMENTUM) * found[1]
    assert low is not None
    assert high is not None
    return low, high


def _threshold(seen: Observed, bits: int) -> Range:
    """[-th, th], or one-sided when all values have one sign."""
    shares = torch.arange(1, CANDIDATES + 1, device=seen.values.device)
    thresholds = max(-seen.low, seen.high) * shares / CANDIDATES
    low = thresholds * (-1.0 if seen.low < 0 else 0.0)
    high = thresholds * (1.0 if seen.high > 0 else 0.0)
    if seen.low < 0 < seen.high:
        high = high * (1 - 2.0 ** (1 - bits))  # one code less above 0 than below, so that 0 is a code in every range
    return best_range(seen.values, low, high, bits)
