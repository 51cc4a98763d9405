"""GPTQ: rounding that makes up for its own errors (Frantar et al., 2022, arXiv 2210.17323; the column updates are those
of Optimal Brain Surgeon).

With inputs x of a layer and H = E[x x^T], the columns of W are rounded one after the other; the error of column j is
spread over the columns that are still float, so that tr((W - W^) H (W - W^)^T), the output error, grows least:

    e_j = (w_j - w^_j) / U_jj,   w_k -= e_j U_jk  for k > j,   U the upper Cholesky factor of H^-1

Letters: O rows, K input features per row, G groups per row.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ...core.config import Config
from ...core.errors import CalibrationError
from ...core.scheme import Scheme
from ...runtime.weight import QuantizedWeight, to_rows
from ..grid import Grid, find_grid, nearest_codes
from ..ranges import Search

BLOCK_COLUMNS = 128  # columns whose updates are applied together to the rest
DAMPING_GROWTH = 10.0  # when H is so singular that the factorization fails
ATTEMPTS = 40  # more than any finite H needs


class GPTQConfig(Config):
    """Fields of `--set`."""

    damping: float = Field(0.01, gt=0, le=1e9)  # share of H's mean diagonal that is added to it; more: closer to rtn
    act_order: bool = True  # columns with the largest inputs first
    smooth: bool = True  # false: no factors for the channels of what enters a convolution


CONFIG = GPTQConfig
NEEDS = ("grams",)  # E[x x^T] of every layer
UNIT = "layer"
ACT_MODE = "dynamic"
FORMATS = ("integer", "nvfp4")


def act_search(config: GPTQConfig) -> Search:
    """How fixed activation ranges are found, where they are asked for."""
    return "mse"


def smooths(config: GPTQConfig) -> bool:
    """Whether convolutions have factors for the channels of what enters them."""
    return config.smooth


def quantize(weight: Tensor, scheme: Scheme, config: GPTQConfig, gram: Tensor) -> QuantizedWeight:
    """Quantize one weight.

    Args:
        weight: (O, *features), any float dtype.
        gram: (K, K) float32, mean of x x^T over the inputs; features in the order of `to_rows`.
    """
    rows = to_rows(weight).float()
    grid = find_grid(rows, scheme, search=True)
    codes, _ = round_columns(rows, gram, grid, config)
    return grid.pack(codes, tuple(weight.shape))


def round_columns(rows: Tensor, gram: Tensor, grid: Grid, config: GPTQConfig) -> tuple[Tensor, Tensor]:
    """Codes (O, K), float32 holding integers, and the values (O, K) whose nearest codes they are: the weights with what
    they make up for."""
    features = rows.shape[1]
    power = gram.diagonal()
    silent = power == 0  # inputs that are always zero: any code will do, the nearest is as good as another
    filled = 1.0 if silent.all() else power[~silent].mean()  # the mean, so that the damping of the others stays
    order = (
        power.argsort(descending=True, stable=True) if config.act_order else torch.arange(features, device=rows.device)
    )
    upper = _inverse_factor(gram, power + silent * filled, config.damping, order)
    remaining, codes, wanted = rows[:, order].clone(), torch.empty_like(rows), torch.empty_like(rows)
    scale, zero_point = grid.columns(features)
    scale, zero_point = scale[:, order], zero_point[:, order]
    for start in range(0, features, BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, features)
        errors = torch.empty_like(remaining[:, start:stop])
        for column in range(start, stop):
            s, z = scale[:, column], zero_point[:, column]
            code = nearest_codes(remaining[:, column] / s, z, grid.scheme)
            error = (remaining[:, column] - (code - z) * s) / upper[column, column]
            remaining[:, column + 1 : stop] -= error[:, None] * upper[column, column + 1 : stop]
            errors[:, column - start] = error
            codes[:, column], wanted[:, column] = code, remaining[:, column]
        remaining[:, stop:] -= errors @ upper[start:stop, stop:]
    back = order.argsort()
    return codes[:, back], wanted[:, back]


def _inverse_factor(gram: Tensor, power: Tensor, damping: float, order: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped gram matrix, columns in `order`.

    H = R R^T with R upper triangular is what the decomposition of H read backwards gives, and U = R^-1. Matrices are
    changed in place: those of a wide layer are most of the memory of the pass.

    Args:
        power: (K,), the diagonal of the gram matrix that is meant.

    Raises:
        CalibrationError: it holds NaN or infinity.
    """
    backwards = order.flip(0)
    power = power[backwards].double()
    mean = float(power.mean())
    unit = mean if mean > 0 else 1.0  # a covariance of constants is noise, whose mean may be negative
    damped = torch.empty_like(gram, dtype=torch.float64).T  # column by column, as LAPACK works in place
    for _ in range(ATTEMPTS):
        damped.copy_(gram[backwards[:, None], backwards])
        damped.diagonal().copy_(power + damping * unit)
        lower, failed = torch.linalg.cholesky_ex(damped, out=(damped, damped.new_empty((), dtype=torch.int32)))
        if not failed:
            inverse = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
            del lower, damped
            return inverse.float().flip(0, 1)
        damping *= DAMPING_GROWTH
    raise CalibrationError(
        "the second moments of what enters a layer cannot be inverted.",
        "They hold NaN or infinity.",
        "See whether the float pipeline makes images from the same inputs; calibrate with others.",
    )
