"""Packed weights with floating-point activations: unpack to the activation dtype, then the float operation.

In bfloat16 a byte with two 4-bit codes becomes two values by bit arithmetic alone: 0x4300 | code is the bfloat16
128 + code, so (byte * 0x1001 & 0x000F000F) ^ 0x43004300 is both values in the order in which they are stored.
Letters: O output channels, K features per row, G groups per row, B bytes per row."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .kernels_scratch import may_use_scratch, scratch
from .packing import unpack_codes
from .weight import QuantizedWeight, from_rows, integer_rows, spread

_FEW_ROWS = 16  # up to here the memory-bound int8 product is faster than unpacking


def linear_weight_only(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """(..., K) float -> (..., O); the weight is unpacked for this call only."""
    rows = x.numel() // max(x.shape[-1], 1)
    if rows > _FEW_ROWS or not _reads_int8_rows(x, weight):
        return F.linear(x, float_weight(x, weight), bias)
    y = _few_rows(x.reshape(rows, x.shape[-1]), weight.qweight.view(torch.int8), weight.scale.view(-1))
    return (y if bias is None else y + bias).view(*x.shape[:-1], y.shape[1])


def _few_rows(x: Tensor, integers: Tensor, scale: Tensor) -> Tensor:
    """(M, K) bfloat16, (O, K) int8, (O,) -> (M, O), reading the integers once and writing no unpacked weight."""
    if torch.compiler.is_compiling():  # it fails to lower torch's own product when the scale is not an input as it is
        return ((x.unsqueeze(1).float() * integers).sum(-1) * scale.float()).to(x.dtype)
    return torch._weight_int8pack_mm(x, integers, scale.to(x.dtype))


def _reads_int8_rows(x: Tensor, weight: QuantizedWeight) -> bool:
    """Torch's product reads past the row, and crashes, when K is not a multiple of its vectors (16 at most)."""
    plain = weight.scheme.bits == 8 and weight.scheme.symmetric and weight.scale.shape[1] == 1
    return plain and x.device.type == "cpu" and x.dtype is torch.bfloat16 and x.shape[-1] % 32 == 0


def float_weight(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """What the integers stand for, in the weight's own shape and the dtype of `x`, for one product with `x`: in eager
    mode it lies in scratch and is valid until the next call."""
    if not may_use_scratch(x) or weight.scheme.format != "integer":
        return weight.residual(x.dtype)
    work_dtype = torch.bfloat16 if x.dtype is torch.bfloat16 else torch.float32
    values, offset = _offset_codes(weight, work_dtype)  # (O, K)
    for grouped, scale, zero_point in _equal_groups(values, weight):
        if zero_point is not None:
            grouped.sub_(zero_point.to(work_dtype).add_(offset).unsqueeze(-1))
        elif offset:
            grouped.sub_(offset)
        grouped.mul_(scale.to(work_dtype).unsqueeze(-1))
    return from_rows(values.to(x.dtype), weight.shape)


def _equal_groups(values: Tensor, weight: QuantizedWeight) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Views (O, G, K/G) of rows with the scale (O, G) and zero point (O, G) of each group: all at once, or those of
    the two parts of a split row, which may differ in size."""
    scale, zero_point, split = weight.scale, weight.zero_point, weight.scheme.split
    if weight.group_scale is not None:
        groups = weight.group_scale.shape[1]
        scale = spread(scale.float(), groups, split and split * groups // values.shape[1]) * weight.group_scale
    if split is None or weight.scheme.group_size is not None:
        yield values.unflatten(1, (scale.shape[1], -1)), scale, zero_point
        return
    for part, columns in enumerate((values[:, :split], values[:, split:])):
        only = slice(part, part + 1)
        yield columns.unsqueeze(1), scale[:, only], None if zero_point is None else zero_point[:, only]


def int8_rows(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """The integers (O, K) of a symmetric weight, group multipliers included, for one product with `x`: for 8 bits a
    view of the stored bytes, else in eager mode valid until the next call."""
    scheme, features = weight.scheme, math.prod(weight.shape[1:])
    if scheme.bits != 4 or not may_use_scratch(x):
        return integer_rows(weight.qweight, weight.group_scale, scheme, features)
    pairs = scratch("weight", tuple(weight.qweight.shape), torch.int16).copy_(weight.qweight)  # (O, B)
    high = scratch("lanes", tuple(pairs.shape), torch.int16)
    pairs.bitwise_or_(torch.bitwise_left_shift(pairs, 4, out=high))
    integers = pairs.bitwise_and_(0x0F0F).bitwise_xor_(0x0808).view(torch.int8)[:, :features].sub_(8)
    if weight.group_scale is not None:
        multipliers = weight.group_scale.view(torch.int8).unsqueeze(-1)  # (O, G, 1)
        integers.unflatten(1, (multipliers.shape[1], -1)).mul_(multipliers)
    return integers


def _offset_codes(weight: QuantizedWeight, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Codes (O, K) as floats in scratch, all larger by the returned offset."""
    scheme, features = weight.scheme, math.prod(weight.shape[1:])
    if scheme.bits == 4:
        lanes = scratch("lanes", tuple(weight.qweight.shape), torch.int32).copy_(weight.qweight)
        sign = 0x00080008 if scheme.symmetric else 0  # two's complement + 8
        lanes.mul_(0x1001).bitwise_and_(0x000F000F).bitwise_xor_(0x43004300 ^ sign)
        codes, offset = lanes.view(torch.bfloat16)[:, :features], 136 if scheme.symmetric else 128
    else:
        codes, offset = unpack_codes(weight.qweight, scheme.bits, features, signed=scheme.symmetric), 0
    if codes.dtype is not dtype:
        codes = scratch("weight", tuple(codes.shape), dtype).copy_(codes)
    return codes, offset
