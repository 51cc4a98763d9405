"""Integers of what enters a layer, against scales that are found in it, one for each row:

    s = max|x| / qmax,  q = round(x / s)

With zero points, all 2 qmax + 2 integers share the range from min(x, 0) to max(x, 0), zero among them:

    s = (max - min) / (2 qmax + 1),  z = -qmax - 1 - round(min / s),  q = round(x / s) + z

What enters behind a SiLU or GELU hardly goes below 0: half of the integers are lost on it without a zero point.
Two forms give the same integers: a functional one, and one for eager CPU that works in blocks, in reused memory.
Letters: M rows (tokens or samples), K values of a row."""

import threading
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .kernels_scratch import may_use_scratch, scratch

QUANTIZE_BLOCK = 2**20  # values quantized at once: larger saves calls, smaller keeps their float32 copy in cache
_SMALLEST_ABSMAX = 1e-30  # rows below this count as zero: their reciprocal would overflow


class LastTokens(threading.local):
    """The tensor last quantized per token in this thread: to_q, to_k and to_v receive the same one."""

    tokens: Callable[[], Tensor | None] = staticmethod(lambda: None)  # a weak reference, once there is one
    key: tuple[float, ...] | None = None  # version (counts in-place changes), address, and how it was rounded
    result: tuple[Tensor, ...]  # integers and, where there are some, their scales


_last = LastTokens()


def quantize_tokens(
    x: Tensor, qmax: int = 127, group_size: int | None = None, *, offset: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`quantize_rows` of (..., K), or of its groups of features, done once for a tensor that several layers receive one
    after the other. In eager mode the result is valid until this thread quantizes other tokens.

    Returns:
        (M, K) int8, scale (M, 1) float32 and zero points like it or None; (M * G, group_size) and (M * G, 1) with
        groups, those of a token together.
    """
    rows = x.reshape(-1, group_size or x.shape[-1])
    if not may_use_scratch(x):
        return quantize_rows(rows, qmax, offset=offset)
    # inference tensors do not count versions
    key = None if x.is_inference() else (x._version, x.data_ptr(), qmax, group_size or 0, offset)
    if key is not None and key == _last.key and _last.tokens() is x:
        integers, scale, *zeros = _last.result
        return integers, scale, zeros[0] if zeros else None
    _last.key = None  # from here on the memory of the last result is overwritten
    integers, scale = scratch("integers", tuple(rows.shape), torch.int8), torch.empty(rows.shape[0], 1)
    zero = torch.empty_like(scale) if offset else None
    _quantize_into(rows, qmax, integers, scale, zero)
    _last.tokens, _last.key = weakref.ref(x), key
    _last.result = (integers, scale) if zero is None else (integers, scale, zero)
    return integers, scale, zero


def quantize_rows(x: Tensor, qmax: int = 127, *, offset: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Integers per row: (M, K) float -> (M, K) int8, scale (M, 1) float32 and, with `offset`, zero points (M, 1)
    float32. A zero row has scale 1."""
    if may_use_scratch(x):
        integers, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[0], 1)
        zero = torch.empty_like(scale) if offset else None
        _quantize_into(x, qmax, integers, scale, zero)
        return integers, scale, zero
    values = x.float()
    if offset:
        inverse, zero = _row_grid(values, qmax)
        return ((values * inverse).round() + zero).clamp_max(qmax).to(torch.int8), 1 / inverse, zero
    absmax = values.abs().amax(1, keepdim=True)  # (M, 1)
    absmax = absmax.masked_fill(absmax < _SMALLEST_ABSMAX, qmax)
    return (values * (qmax / absmax)).round().to(torch.int8), absmax / qmax, None


def _quantize_into(x: Tensor, qmax: int, integers: Tensor, scale: Tensor, zero: Tensor | None) -> None:
    """`quantize_rows`, a block at a time, into given tensors."""
    for rows in blocks(x.shape[0], QUANTIZE_BLOCK // max(x.shape[1], 1)):
        block = x[rows]
        values = scratch("values", tuple(block.shape), torch.float32).copy_(block)
        if zero is None:
            absmax = _row_absmax(values, qmax)
            torch.div(absmax, qmax, out=scale[rows])
            integers[rows].copy_(values.mul_(qmax / absmax).round_())
        else:
            inverse, zero[rows] = _row_grid(values, qmax)
            torch.reciprocal(inverse, out=scale[rows])
            integers[rows].copy_(values.mul_(inverse).round_().add_(zero[rows]).clamp_max_(qmax))


def _row_absmax(x: Tensor, qmax: int) -> Tensor:
    if x.shape[1] == 0:
        return x.new_full((x.shape[0], 1), qmax)
    absmax = torch.maximum(x.amax(1, keepdim=True), -x.amin(1, keepdim=True))  # (M, 1); faster than abs or aminmax
    return absmax.masked_fill(absmax < _SMALLEST_ABSMAX, qmax)


def _row_grid(x: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    """Reciprocal scales and zero points (M, 1) of rows (M, K) float32. No integer lies below -qmax - 1; one may be
    rounded to qmax + 1, which is to be clamped."""
    if x.shape[1] == 0:
        return x.new_ones(x.shape[0], 1), x.new_zeros(x.shape[0], 1)
    low, high = x.amin(1, keepdim=True).clamp_max(0), x.amax(1, keepdim=True).clamp_min(0)
    span = high - low
    inverse = (2 * qmax + 1) / span.masked_fill(span < _SMALLEST_ABSMAX, 2 * qmax + 1)
    return inverse, -qmax - 1 - (low * inverse).round()


def blocks(size: int, step: int) -> Iterator[slice]:
    step = max(step, 1)
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
