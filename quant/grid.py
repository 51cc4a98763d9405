"""From float values to scale, zero point and integer codes. Pure functions on grouped rows.

Letters: O rows, G groups per row, N values per group. All arithmetic is float32; scales are rounded to their stored
precision first, so that codes are optimal for the scale that the file really holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT16_SAFE = (2.0**-14, 65504.0)  # normal range: smaller scales would lose mantissa bits
SHRINK_STEPS = 20  # candidates of the range search: 1.0, 0.98, ... of the full range
TWO_LEVEL_MAX = 15  # 15 * 8 = 120 still fits int8 for 4-bit codes


def split_groups(weight: Tensor, group_size: int | None) -> Tensor:
    """(O, K) -> (O, G, N) float32; one group per row when `group_size` is None."""
    rows, features = weight.shape
    return weight.float().reshape(rows, -1, group_size or features)


def stored_scale(scale: Tensor) -> Tensor:
    """Scales as the file will hold them: float32 for one scale per row, else float16 where that loses no range."""
    if scale.shape[1] == 1:
        return scale.float()
    low, high = FLOAT16_SAFE
    return scale.half() if bool((scale >= low).all()) and bool((scale <= high).all()) else scale.float()


def minmax_grid(groups: Tensor, bits: int, *, symmetric: bool, shrink: float = 1.0) -> tuple[Tensor, Tensor]:
    """Scale and zero point that cover the range of each group, which always includes 0.

    Args:
        groups: (O, G, N).
        shrink: share of the range to cover; values outside are clipped.

    Returns:
        scale (O, G) float32 > 0 and zero_point (O, G) float32 (all zeros when symmetric).
    """
    low = groups.amin(-1).clamp(max=0) * shrink
    high = groups.amax(-1).clamp(min=0) * shrink
    if symmetric:
        top = 2 ** (bits - 1)
        scale = torch.maximum(high / (top - 1), -low / top)
        return torch.where(scale > 0, scale, 1.0), torch.zeros_like(scale)
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, (-low / scale).round().clamp(0, 2**bits - 1)


def round_codes(groups: Tensor, scale: Tensor, zero_point: Tensor, code_range: tuple[int, int]) -> Tensor:
    """Nearest codes, (O, G, N) float32 holding integers."""
    codes = (groups / scale.float().unsqueeze(-1)).round_() + zero_point.unsqueeze(-1)
    return codes.clamp_(*code_range)


def squared_error(groups: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Sum of squared differences per group, (O, G)."""
    return ((codes - zero_point.unsqueeze(-1)) * scale.float().unsqueeze(-1) - groups).square_().sum(-1)


def search_grid(groups: Tensor, bits: int, *, symmetric: bool, code_range: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The grid with least squared error per group: shrunken ranges, then a least-squares step on the scale.

    Covering the whole range spends codes on rare extremes; clipping them a little lowers the error of all others. For
    fixed codes q the best scale has the closed form <w, q - z> / <q - z, q - z>; it is kept only where it helps.

    Returns:
        scale (O, G) float32 and zero_point (O, G) float32. Never worse than `minmax_grid` on any group.
    """
    best_scale, best_zero = minmax_grid(groups, bits, symmetric=symmetric)
    best_error = _error(groups, best_scale, best_zero, code_range)

    def keep_better(scale: Tensor, zero: Tensor) -> None:
        nonlocal best_scale, best_zero, best_error
        error = _error(groups, scale, zero, code_range)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
        best_error = torch.where(better, error, best_error)

    for step in range(1, SHRINK_STEPS):
        keep_better(*minmax_grid(groups, bits, symmetric=symmetric, shrink=1.0 - 0.02 * step))
    for _ in range(2):
        centred = round_codes(groups, best_scale, best_zero, code_range) - best_zero.unsqueeze(-1)
        power = centred.square().sum(-1)
        fitted = (groups * centred).sum(-1) / power.clamp(min=1e-12)
        keep_better(torch.where((power > 0) & (fitted > 0), fitted, best_scale), best_zero)
    return best_scale, best_zero


def two_level_scale(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Split group scales into a float scale per row and small integer multipliers.

    Args:
        scale: (O, G) wanted group scales; 0 for a group of zeros, which has no say in the scale of its row.

    Returns:
        row scale (O, 1) float32 > 0 and multipliers (O, G) float32 in 1..15.
    """
    row_scale = scale.amax(-1, keepdim=True) / TWO_LEVEL_MAX
    row_scale = torch.where(row_scale > 0, row_scale, 1.0)
    return row_scale, (scale / row_scale).round_().clamp_(1, TWO_LEVEL_MAX)


def _error(groups: Tensor, scale: Tensor, zero: Tensor, code_range: tuple[int, int]) -> Tensor:
    return squared_error(groups, round_codes(groups, scale, zero, code_range), scale, zero)
