"""Round to nearest: the plain baseline that needs no data and judges every other method.

    q = clamp(round(w / scale) + zero_point, lowest, highest),   w^ = scale * (q - zero_point)

The range of each group is its minimum and maximum, or the one with least squared error among shrunken ranges (the usual
range search of post-training quantization, see Nagel et al. 2021, arXiv 2106.08295, section 3).
Letters: O out_features, K in_features, G = K / group_size.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ...core.config import Config
from ...core.scheme import Scheme
from ...runtime.weight import QuantizedWeight, to_rows
from ..grid import find_grid
from ..ranges import Search

SEARCHED_BITS = 5  # up to here clipping rare extremes pays


class RTNConfig(Config):
    """Fields of `--set`."""

    search: Literal["auto", "minmax", "mse"] = "auto"  # mse: slower, less error; auto: mse up to 5 bits


CONFIG = RTNConfig
NEEDS: tuple[str, ...] = ()  # no calibration statistics
UNIT = "layer"
ACT_MODE = "dynamic"
FORMATS = ("integer", "nvfp4")


def act_search(config: RTNConfig) -> Search:
    """How fixed activation ranges are found, where they are asked for."""
    return "minmax" if config.search == "minmax" else "mse"


def quantize(weight: Tensor, scheme: Scheme, config: RTNConfig) -> QuantizedWeight:
    """Quantize one weight.

    Args:
        weight: (O, *features), any float dtype.
        scheme: number format; its group size divides the features per row.
    """
    rows = to_rows(weight)
    search = config.search == "mse" or (config.search == "auto" and scheme.bits <= SEARCHED_BITS)
    grid = find_grid(rows, scheme, search=search)
    return grid.pack(grid.nearest(rows), tuple(weight.shape))
