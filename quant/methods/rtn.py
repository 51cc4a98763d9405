"""Round to nearest: the plain baseline that needs no data and judges every other method.

    q = clamp(round(w / scale) + zero_point, lowest, highest),   w^ = scale * (q - zero_point)

The range of each group is its minimum and maximum, or the one with least squared error among shrunken ranges (the usual
range search of post-training quantization, see Nagel et al. 2021, arXiv 2106.08295, section 3).
Letters: O out_features, K in_features, G = K / group_size.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...core.config import Config
from ...core.scheme import Scheme
from ...runtime.weight import QuantizedWeight, to_rows
from ..grid import minmax_grid, round_codes, search_grid, split_groups, stored_scale, two_level_scale

ROWS_VALUES = 1 << 19  # values treated at once: small enough to stay in cache through the passes of the search


class RTNConfig(Config):
    """Fields of `--set`."""

    search: Literal["auto", "minmax", "mse"] = "auto"  # mse: slower, less error; auto: mse up to 5 bits


CONFIG = RTNConfig
NEEDS: tuple[str, ...] = ()  # no calibration statistics
UNIT = "layer"


def quantize(weight: Tensor, scheme: Scheme, config: RTNConfig) -> QuantizedWeight:
    """Quantize one weight.

    Args:
        weight: (O, *features), any float dtype.
        scheme: number format; its group size divides the features per row.
    """
    rows = to_rows(weight)
    step = max(1, ROWS_VALUES // rows.shape[1])
    parts = [_grid(chunk, scheme, config) for chunk in rows.split(step)]
    scale, zero_point, group_scale = (torch.cat(column) for column in zip(*parts, strict=True))
    scale = stored_scale(scale)
    effective = scale.float() * group_scale
    codes = [
        round_codes(split_groups(chunk, scheme.group_size), s, z, scheme.code_range).flatten(1).to(torch.int16)
        for chunk, s, z in zip(rows.split(step), effective.split(step), zero_point.split(step), strict=True)
    ]
    return QuantizedWeight.from_codes(
        torch.cat(codes),
        scheme,
        tuple(weight.shape),
        scale=scale,
        zero_point=None if scheme.symmetric else zero_point,
        group_scale=group_scale if scheme.two_level else None,
    )


def _grid(rows: Tensor, scheme: Scheme, config: RTNConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Scale (O, G or 1), zero point (O, G) and group multipliers (O, G or 1), float32 each."""
    groups = split_groups(rows, scheme.group_size)
    if config.search == "mse" or (config.search == "auto" and scheme.bits <= 5):
        scale, zero_point = search_grid(groups, scheme.bits, symmetric=scheme.symmetric, code_range=scheme.code_range)
    else:
        scale, zero_point = minmax_grid(groups, scheme.bits, symmetric=scheme.symmetric)
    if scheme.two_level:
        row_scale, multipliers = two_level_scale(torch.where(groups.any(-1), scale, 0.0))
        return row_scale, zero_point, multipliers
    return scale, zero_point, torch.ones_like(scale[:, :1])
