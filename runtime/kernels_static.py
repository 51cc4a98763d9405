"""Linear and convolution on int8 weights and activations that are rounded against one fixed scale s_x:

    q_x = quantize_static(x)                                        see activation.py; z its zero point, -128..127
    y   = (q_x . q_w - z * sum(q_w)) * s_x * s_w + bias

What does not depend on x goes into the bias. Padding holds z, which stands for an exact zero. Both forms of
kernels_int8.py are here too: functional, and in reused memory for eager CPU.
Letters: M rows (tokens or pixels), K inner size, O out_features, N samples, C in_channels, H W."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .activation import quantize_static
from .kernels_int8 import Geometry, int8_convolution, int8_product
from .kernels_round import QUANTIZE_BLOCK, LastTokens, blocks
from .kernels_scratch import may_use_scratch, scratch

_last = LastTokens()


@dataclass(frozen=True)
class StaticInput:
    """How a layer rounds what enters it, and what its zero point needs."""

    scale: Tensor  # () float32
    zero_point: Tensor  # () uint8
    row_sums: Tensor  # (O,) int32, sums of the integers in each row of the weight
    bits: int

    def fold(self, weight_scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale and bias (O,) float32 each, with which the integer sums give the output."""
        scale = self.scale * weight_scale.float()
        moved = self.row_sums * (self.zero_point.float() - 2 ** (self.bits - 1)) * scale
        return scale, -moved if bias is None else bias.float() - moved


def linear_int8_static(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    act: StaticInput,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """(..., K) float, (O, K) int8, (O,) float -> (..., O) of `dtype`, which is that of `x` by default."""
    integers = _static_tokens(x, act)
    y = int8_product(integers, None, weight, *act.fold(weight_scale, bias), dtype or x.dtype)
    return y.view(*x.shape[:-1], weight.shape[0])


def conv2d_int8_static(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    act: StaticInput,
    kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """(N, C, H, W) float, (O, K) int8 with channels innermost, (O,) float -> (N, O, H', W') in channels_last."""
    geometry = Geometry(kernel_size, stride, dilation, groups)
    pixels = _static_pixels(x, act, padding)
    return int8_convolution(pixels, None, weight, *act.fold(weight_scale, bias), dtype or x.dtype, geometry)


def _static_tokens(x: Tensor, act: StaticInput) -> Tensor:
    """(..., K) -> (M, K) int8, done once for a tensor that several layers with equal scales receive one after the
    other. In eager mode the result is valid until this thread rounds other tokens."""
    rows = x.reshape(-1, x.shape[-1])  # (M, K)
    if not may_use_scratch(x):
        return quantize_static(rows, act.scale, act.zero_point, act.bits)
    scale, zero_point = float(act.scale), int(act.zero_point)
    # inference tensors do not count versions
    key = None if x.is_inference() else (x._version, x.data_ptr(), scale, zero_point, act.bits)
    if key is not None and key == _last.key and _last.tokens() is x:
        return _last.result[0]
    _last.key = None  # from here on the memory of the last result is overwritten
    integers = scratch("static_integers", tuple(rows.shape), torch.int8)
    _quantize_into(rows, act, integers)
    _last.tokens, _last.key, _last.result = weakref.ref(x), key, (integers,)
    return integers


def _static_pixels(x: Tensor, act: StaticInput, padding: tuple[int, int]) -> Tensor:
    """(N, C, H, W) -> (N, H, W, C) int8 with padding around."""
    around = (0, 0, padding[1], padding[1], padding[0], padding[0])
    pixels = x.permute(0, 2, 3, 1)
    if not may_use_scratch(x):  # zeros become the zero point, which is known on the device only
        return quantize_static(F.pad(pixels, around), act.scale, act.zero_point, act.bits)
    if pixels.is_contiguous():
        integers = torch.empty(pixels.shape, dtype=torch.int8)
        _quantize_into(pixels.view(-1), act, integers.view(-1))
    else:  # bytes are cheaper to put in another order than floats
        values = x.contiguous()
        integers = torch.empty(x.shape, dtype=torch.int8)
        _quantize_into(values.view(-1), act, integers.view(-1))
        integers = integers.permute(0, 2, 3, 1).contiguous()
    return F.pad(integers, around, value=int(act.zero_point) - 2 ** (act.bits - 1)) if any(padding) else integers


def _quantize_into(x: Tensor, act: StaticInput, integers: Tensor) -> None:
    """`quantize_static`, a block at a time, into a given tensor."""
    half = 2 ** (act.bits - 1)
    inverse, zero_point = act.scale.reciprocal(), int(act.zero_point) - half
    for some in blocks(x.shape[0], QUANTIZE_BLOCK // max(x[:1].numel(), 1)):
        block = x[some]
        values = scratch("values", tuple(block.shape), torch.float32)
        if block.dtype is torch.float32:
            torch.mul(block, inverse, out=values)
        else:  # a product with a scale () would be rounded to the narrower dtype
            values.copy_(block).mul_(inverse)
        values.round_()
        if zero_point:
            values.add_(zero_point)
        integers[some].copy_(values.clamp_(-half, half - 1))
