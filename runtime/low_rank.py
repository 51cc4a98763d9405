"""What a layer keeps beside its integers, so that these need not hold outliers (SVDQuant: Li et al., 2024,
arXiv 2411.05007):

    W diag(s) = up down + R        y = Q(x / s) Q(R)^T + ((x / s) down^T) up^T + b

The smoothing s moves outliers of the inputs into the weight; the low-rank branch, in floating point, takes them out of
it again, and the integers hold R. Either of the two may be absent. A convolution may have s, one factor for each input
channel; linears alone have branches and shifts.

Inputs that are never far below 0, as those behind a GELU, have a constant c added before they are rounded, so that no
code stands for a sign. What it adds to the outputs is known beforehand:

    Q(R) (x / s) ~ Q(R) Q((x + c) / s) - Q(R) (c / s)
Letters: O output features, K input features, r rank of the branch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..core.scheme import Scheme

# processors without arithmetic for bfloat16 emulate it, and take many times as long as for float32
_BFLOAT16_ON_CPU = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()

LOW_RANK_NAMES = ("smoothing", "low_rank_down", "low_rank_up", "act_shift")


def low_rank_shapes(
    scheme: Scheme, weight_shape: tuple[int, ...]
) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Shapes and dtypes of the stored tensors, as `state_shapes`; factors are float32 where float16 would overflow."""
    rows, features = weight_shape[:2]
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {}
    if scheme.smooth:
        shapes["smoothing"] = ((features,), torch.float16)
    if scheme.rank is not None:
        shapes["low_rank_down"] = ((scheme.rank, features), torch.float16)
        shapes["low_rank_up"] = ((rows, scheme.rank), torch.float16)
    if scheme.shifted:
        shapes["act_shift"] = ((1,), torch.float32)
    return shapes


def whole_weight(residual: Tensor, smoothing: Tensor | None, down: Tensor | None, up: Tensor | None) -> Tensor:
    """(R + up down) / s, float32 in the shape of R: (O, K), or (O, I, *kernel) of a convolution. The product is exact
    before it is rounded once: in double precision the order of its sums does not matter."""
    if up is not None and down is not None:
        residual = residual + (up.double() @ down.double()).float()
    return residual if smoothing is None else residual / along(smoothing, residual, 1).float()


def smoothed(x: Tensor, smoothing: Tensor | None, axis: int = -1) -> Tensor:
    """x / s in the dtype of `x`, whose channels lie along `axis`."""
    return x if smoothing is None else x / along(smoothing, x, axis).to(x.dtype)


def along(smoothing: Tensor, x: Tensor, axis: int) -> Tensor:
    """Factors as a view that multiplies `x` along one of its axes."""
    return smoothing.view(-1, *[1] * (x.dim() - 1 - axis % x.dim()))


def shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    """x + c, nowhere below 0, in the dtype of `x`."""
    return x if shift is None else (x + shift.to(x.dtype)).clamp(min=0)


def shift_outputs(residual: Tensor, smoothing: Tensor | None, shift: Tensor) -> Tensor:
    """What a shift adds to the outputs, (O,) float32: Q(R) (c / s) for the residual (O, K)."""
    columns = torch.ones_like(residual[0]) if smoothing is None else smoothing.float().reciprocal()
    return (residual.double() @ columns.double() * shift.double()).float()


def add_low_rank(y: Tensor, x: Tensor, down: Tensor | None, up: Tensor | None) -> Tensor:
    """y (..., O) plus the outputs of the branch for smoothed inputs x (..., K)."""
    if down is None or up is None:
        return y
    emulated = x.dtype is torch.bfloat16 and x.device.type == "cpu" and not _BFLOAT16_ON_CPU
    x = x.float() if emulated else x
    inner = functional.linear(x, down.to(x.dtype))  # (..., r)
    return y + functional.linear(inner, up.to(x.dtype)).to(y.dtype)
