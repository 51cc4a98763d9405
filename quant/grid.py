"""From float values to scale, zero point and integer codes. A `Grid` for a weight, pure functions on grouped rows.

Letters: O rows, G groups per row, N values per group. All arithmetic is float32; scales are rounded to their stored
precision first, so that codes are optimal for the scale that the file really holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.scheme import Scheme
from ..runtime.nvfp4 import e2m1_codes, e4m3_bytes, round_e2m1
from ..runtime.packing import pack_codes
from ..runtime.weight import QuantizedWeight, scale_columns, spread
from .nvfp4_scales import nvfp4_scales

FLOAT16_SAFE = (2.0**-14, 65504.0)  # normal range: smaller scales would lose mantissa bits
SHRINK_STEPS = 20  # candidates of the range search: 1.0, 0.98, ... of the full range
SURE = 1 - 1e-5  # no order of summation loses more than that
TWO_LEVEL_MAX = 15  # 15 * 8 = 120 still fits int8 for 4-bit codes
ROWS_VALUES = 1 << 19  # values treated at once: small enough to stay in cache through the passes of the search


@dataclass(frozen=True)
class Grid:
    """The values that a weight may take: scales in their stored precision, and zero points.

    Codes are integers; of NVFP4 the 4-bit floats themselves, so that values are codes times scales as well.
    P: 2 for a scheme with a split (one scale for each part of the input channels), else 1.
    """

    scheme: Scheme
    scale: Tensor  # (O, G); (O, P) for per-channel and two-level schemes; (O, 1), all equal, for NVFP4
    zero_point: Tensor  # (O, G) float32, zeros when symmetric
    group_scale: Tensor  # (O, G) float32 multipliers of two-level schemes and scales of NVFP4, else (O, P) ones

    def columns(self, features: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of every value, (O, K) float32 each."""
        scale = scale_columns(self.scale, self.group_scale, self.scheme, features)
        return scale, spread(self.zero_point, features, self.scheme.split)

    def nearest(self, rows: Tensor) -> Tensor:
        """Nearest codes (O, K) of rows (O, K): int16, or float32 for NVFP4."""
        return torch.cat([part._nearest(chunk) for part, chunk in self._chunks(rows)])

    def round(self, rows: Tensor) -> Tensor:
        """The nearest values of the grid, (O, K) float32."""
        scale, zero = self.columns(rows.shape[1])
        return (self.nearest(rows) - zero) * scale

    def pack(self, codes: Tensor, shape: tuple[int, ...]) -> QuantizedWeight:
        """Codes (O, K) with their scales; `shape` is that of the float weight."""
        if self.scheme.format == "nvfp4":
            packed, whole = pack_codes(e2m1_codes(codes), self.scheme.bits), self.scale[:1].clone()
            return QuantizedWeight(self.scheme, shape, packed, whole, group_scale=e4m3_bytes(self.group_scale))
        return QuantizedWeight.from_codes(
            codes.to(torch.int16),
            self.scheme,
            shape,
            scale=self.scale,
            zero_point=None if self.scheme.symmetric else self.zero_point,
            group_scale=self.group_scale if self.scheme.two_level else None,
        )

    def _nearest(self, rows: Tensor) -> Tensor:
        scale, zero = self.columns(rows.shape[1])
        codes = nearest_codes(rows.float() / scale, zero, self.scheme)
        return codes.to(torch.int16) if self.scheme.format == "integer" else codes

    def _chunks(self, rows: Tensor) -> Iterator[tuple[Grid, Tensor]]:
        step = max(1, ROWS_VALUES // rows.shape[1])
        for start in range(0, len(rows), step):
            some = slice(start, start + step)
            yield Grid(self.scheme, self.scale[some], self.zero_point[some], self.group_scale[some]), rows[some]


def find_grid(rows: Tensor, scheme: Scheme, *, search: bool) -> Grid:
    """The grid of a weight.

    Args:
        rows: (O, K), any float dtype.
        search: for the range with least squared error; otherwise minimum and maximum.
    """
    if scheme.format == "nvfp4":
        whole, blocks = nvfp4_scales(rows, search=search)
        return Grid(scheme, whole.repeat(len(rows), 1), torch.zeros_like(blocks), blocks)
    if scheme.split and (scheme.two_level or scheme.group_size is None):
        return _grid_of_parts(rows, scheme, search=search)
    step = max(1, ROWS_VALUES // rows.shape[1])
    parts = [_grid_of_rows(chunk, scheme, search=search) for chunk in rows.split(step)]
    scale, zero_point, group_scale = (torch.cat(column) for column in zip(*parts, strict=True))
    return Grid(scheme, stored_scale(scale), zero_point, group_scale)


def _grid_of_parts(rows: Tensor, scheme: Scheme, *, search: bool) -> Grid:
    """Each part of the input channels by itself."""
    assert scheme.split is not None
    whole = scheme.model_copy(update={"split": None})
    sizes = [scheme.split, rows.shape[1] - scheme.split]
    grids = [find_grid(part, whole, search=search) for part in rows.split(sizes, dim=1)]
    scale, zero_point, group_scale = (
        torch.cat([getattr(grid, name) for grid in grids], dim=1) for name in ("scale", "zero_point", "group_scale")
    )
    return Grid(scheme, scale, zero_point, group_scale)


def _grid_of_rows(rows: Tensor, scheme: Scheme, *, search: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scale (O, G or 1), zero point (O, G) and group multipliers (O, G or 1), float32 each."""
    groups = split_groups(rows, scheme.group_size)
    if search:
        scale, zero_point = search_grid(groups, scheme.bits, symmetric=scheme.symmetric, code_range=scheme.code_range)
    else:
        scale, zero_point = minmax_grid(groups, scheme.bits, symmetric=scheme.symmetric)
    if scheme.two_level:
        row_scale, multipliers = two_level_scale(torch.where(groups.any(-1), scale, 0.0))
        return row_scale, zero_point, multipliers
    return scale, zero_point, torch.ones_like(scale[:, :1])


def split_groups(weight: Tensor, group_size: int | None) -> Tensor:
    """(O, K) -> (O, G, N) float32; one group per row when `group_size` is None."""
    rows, features = weight.shape
    return weight.float().reshape(rows, -1, group_size or features)


def stored_scale(scale: Tensor) -> Tensor:
    """Scales as the file will hold them: float16 where that loses no range, else float32."""
    low, high = FLOAT16_SAFE
    return scale.half() if bool((scale >= low).all()) and bool((scale <= high).all()) else scale.float()


def minmax_grid(groups: Tensor, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point that cover the range of each group, which always includes 0.

    Args:
        groups: (O, G, N).

    Returns:
        scale (O, G) float32 > 0 and zero_point (O, G) float32 (all zeros when symmetric).
    """
    return _covering(*_range(groups), bits, symmetric=symmetric)


def _range(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each group and 0, (O, G) each."""
    return groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)


def _covering(low: Tensor, high: Tensor, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point, (O, G) each, of codes from low <= 0 to high >= 0."""
    if symmetric:
        top = 2 ** (bits - 1)
        scale = torch.maximum(high / (top - 1), -low / top)
        return torch.where(scale > 0, scale, 1.0), torch.zeros_like(scale)
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, (-low / scale).round().clamp(0, 2**bits - 1)


def nearest_codes(units: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """Codes, float32, of values in units of their scale."""
    if scheme.format == "nvfp4":
        return round_e2m1(units)
    return units.round().add_(zero_point).clamp_(*scheme.code_range)


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

    What a range clips off the two extremes alone is an error that needs no rounding to be known. A candidate by which
    that exceeds the least error so far in every group is passed over, with 8 bits most of them; the result is the same.

    Returns:
        scale (O, G) float32 and zero_point (O, G) float32. Never worse than `minmax_grid` on any group.
    """
    low, high = _range(groups)
    best_scale, best_zero = _covering(low, high, bits, symmetric=symmetric)
    best_error = _error(groups, best_scale, best_zero, code_range)

    def keep_better(scale: Tensor, zero: Tensor) -> None:
        nonlocal best_scale, best_zero, best_error
        error = _error(groups, scale, zero, code_range)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
        best_error = torch.where(better, error, best_error)

    for step in range(1, SHRINK_STEPS):
        shrink = 1.0 - 0.02 * step
        scale, zero = _covering(low * shrink, high * shrink, bits, symmetric=symmetric)
        if bool((_clipped(low, high, scale, zero, code_range) < best_error).any()):
            keep_better(scale, zero)
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


def _clipped(low: Tensor, high: Tensor, scale: Tensor, zero: Tensor, code_range: tuple[int, int]) -> Tensor:
    """At least so much squared error (O, G) has a grid in groups from `low` to `high`: that of these two values."""
    first, last = (((code - zero) * scale) for code in code_range)
    of_extremes = (first - low).clamp_(min=0).square_() + (high - last).clamp_(min=0).square_()
    return of_extremes * SURE


def _error(groups: Tensor, scale: Tensor, zero: Tensor, code_range: tuple[int, int]) -> Tensor:
    return squared_error(groups, round_codes(groups, scale, zero, code_range), scale, zero)
