"""Linear and convolution on int8 weights and int8 activations, exact in int32:

    q_x = round(x / s_x),  s_x = max|x| / qmax          one s_x per token (linear) or per sample (convolution)
    y   = (q_x . q_w) * s_x * s_w + bias

Two forms give the same integers: a functional one (torch.compile fuses it; CUDA; autograd), and one for eager CPU that
works in blocks, in reused memory. Products run on plain (O, K) int8 rows: no second copy of the weight.
Letters: M rows (tokens or pixels), K inner size, O out_features, R rows of one block, N samples, C in_channels, H W."""

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .kernels_exact import exact_product, exact_product_into, has_int8_products
from .kernels_scratch import may_use_scratch, scratch
from .weight import from_rows

QUANTIZE_BLOCK = 2**20  # values quantized at once: larger saves calls, smaller keeps their float32 copy in cache
_PRODUCT_BLOCK = 2**22  # int32 sums at once (16 MB): larger saves repacking the weight, smaller saves memory
_PATCH_BLOCK = 2**24  # bytes of convolution patches at once: likewise
_SMALLEST_ABSMAX = 1e-30  # rows below this count as zero: their reciprocal would overflow


class Geometry(NamedTuple):
    """How a kernel lies on an image that is already padded."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


class LastTokens(threading.local):
    """The tensor last quantized per token in this thread: to_q, to_k and to_v receive the same one."""

    tokens: Callable[[], Tensor | None] = staticmethod(lambda: None)  # a weak reference, once there is one
    key: tuple[float, ...] | None = None  # version (counts in-place changes), address, and how it was rounded
    result: tuple[Tensor, ...]  # integers and, where there are some, their scales


_last = LastTokens()


def linear_int8_dynamic(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    qmax: int = 127,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """(..., K) float, (O, K) int8, (O,) float -> (..., O) of `dtype` (of `x` by default), activations quantized per
    token."""
    integers, scale = quantize_tokens(x, qmax)
    y = int8_product(integers, scale, weight, weight_scale, bias, dtype or x.dtype)
    return y.view(*x.shape[:-1], weight.shape[0])


def conv2d_int8_dynamic(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    qmax: int = 127,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """(N, C, H, W) float, (O, K) int8 with channels innermost, (O,) float -> (N, O, H', W') in channels_last,
    activations quantized per sample."""
    pixels = x.permute(0, 2, 3, 1)  # (N, H, W, C)
    integers, scale = quantize_rows(pixels.flatten(1), qmax)
    integers = F.pad(integers.view(pixels.shape), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    geometry = Geometry(kernel_size, stride, dilation, groups)
    return int8_convolution(integers, scale, weight, weight_scale, bias, dtype or x.dtype, geometry)


def int8_convolution(
    integers: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    geometry: Geometry,
) -> Tensor:
    """Padded (N, H, W, C) int8, (N, 1) float32 or None for a scale of 1, (O, K) int8, (O,) float32 -> (N, O, H', W')
    of `dtype`."""
    if geometry.groups > 1:
        return _grouped_conv(integers, scale, weight, weight_scale, bias, dtype, geometry)
    taps = _taps(integers, geometry)
    out_shape = (*taps[0].shape[:3], weight.shape[0])  # (N, H', W', O)
    if scale is not None:
        scale = scale.repeat_interleave(out_shape[1] * out_shape[2], 0)  # (N*H'*W', 1)
    if not _in_place(integers, scale, weight_scale):
        rows = torch.cat(taps, -1).view(-1, weight.shape[1])
        return int8_product(rows, scale, weight, weight_scale, bias, dtype).view(out_shape).permute(0, 3, 1, 2)
    output = torch.empty(out_shape, dtype=dtype)
    _conv_blocks(taps, scale, weight, weight_scale.float(), _plain_bias(bias), output)
    return output.permute(0, 3, 1, 2)


def quantize_tokens(x: Tensor, qmax: int = 127, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of (..., K), or of its groups of features, done once for a tensor that several layers receive one
    after the other. In eager mode the result is valid until this thread quantizes other tokens.

    Returns:
        (M, K) int8 and scale (M, 1) float32; (M * G, group_size) and (M * G, 1) with groups, those of a token together.
    """
    rows = x.reshape(-1, group_size or x.shape[-1])
    if not may_use_scratch(x):
        return quantize_rows(rows, qmax)
    # inference tensors do not count versions
    key = None if x.is_inference() else (x._version, x.data_ptr(), qmax, group_size or 0)
    if key is not None and key == _last.key and _last.tokens() is x:
        return _last.result[0], _last.result[1]
    _last.key = None  # from here on the memory of the last result is overwritten
    result = scratch("integers", tuple(rows.shape), torch.int8), torch.empty(rows.shape[0], 1)
    _quantize_into(rows, qmax, *result)
    _last.tokens, _last.key, _last.result = weakref.ref(x), key, result
    return result


def quantize_rows(x: Tensor, qmax: int = 127) -> tuple[Tensor, Tensor]:
    """Symmetric integers per row: (M, K) float -> (M, K) int8 and scale (M, 1) float32. A zero row has scale 1."""
    if may_use_scratch(x):
        integers, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[0], 1)
        _quantize_into(x, qmax, integers, scale)
        return integers, scale
    absmax = x.float().abs().amax(1, keepdim=True)  # (M, 1)
    absmax = absmax.masked_fill(absmax < _SMALLEST_ABSMAX, qmax)
    return (x.float() * (qmax / absmax)).round().to(torch.int8), absmax / qmax


def _quantize_into(x: Tensor, qmax: int, integers: Tensor, scale: Tensor) -> None:
    """`quantize_rows`, a block at a time, into given tensors."""
    for rows in blocks(x.shape[0], QUANTIZE_BLOCK // max(x.shape[1], 1)):
        block = x[rows]
        values = scratch("values", tuple(block.shape), torch.float32).copy_(block)
        absmax = _row_absmax(values, qmax)
        torch.div(absmax, qmax, out=scale[rows])
        integers[rows].copy_(values.mul_(qmax / absmax).round_())


def _row_absmax(x: Tensor, qmax: int) -> Tensor:
    if x.shape[1] == 0:
        return x.new_full((x.shape[0], 1), qmax)
    absmax = torch.maximum(x.amax(1, keepdim=True), -x.amin(1, keepdim=True))  # (M, 1); faster than abs or aminmax
    return absmax.masked_fill(absmax < _SMALLEST_ABSMAX, qmax)


def _in_place(integers: Tensor, scale: Tensor | None, weight_scale: Tensor) -> bool:
    """Whether a product may work in reused memory; its scales carry what asks for gradients."""
    return may_use_scratch(integers) and may_use_scratch(weight_scale) and (scale is None or may_use_scratch(scale))


def int8_product(
    integers: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """(M, K) int8, (M, 1) float32 or None for a scale of 1, (O, K) int8, (O,) float32 -> (M, O) of `dtype`."""
    if not _in_place(integers, scale, weight_scale):
        y = _int_mm(integers, weight.t()).float()
        y = (y if scale is None else y * scale) * weight_scale.float()
        return (y if bias is None else y + bias.float()).to(dtype)
    output = torch.empty(integers.shape[0], weight.shape[0], dtype=dtype)
    weight_scale = weight_scale.float()
    bias = _plain_bias(bias)
    for rows in blocks(integers.shape[0], _PRODUCT_BLOCK // max(weight.shape[0], 1)):
        _product_into(integers[rows], None if scale is None else scale[rows], weight, weight_scale, bias, output[rows])
    return output


def _product_into(
    integers: Tensor, scale: Tensor | None, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, output: Tensor
) -> None:
    """One block, into `output` (R, O); the int32 sums become float32 where they lie."""
    sums = scratch("sums", tuple(output.shape), torch.int32)
    y = sums.view(torch.float32)
    if has_int8_products():
        torch._int_mm(integers, weight.t(), out=sums)
        y.copy_(sums)
    else:
        exact_product_into(integers, weight, y)
    if scale is not None:
        y.mul_(scale)
    output.copy_(y.mul_(weight_scale) if bias is None else torch.addcmul(bias, y, weight_scale, out=y))


def _conv_blocks(
    taps: list[Tensor],
    scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    output: Tensor,
) -> None:
    """Gathers patches of some whole samples, or of some image rows of one, and multiplies them."""
    samples, height, width, out_channels = output.shape
    rows_at_once = min(_PATCH_BLOCK // max(weight.shape[1], 1), _PRODUCT_BLOCK // max(out_channels, 1))
    flat = output.view(-1, out_channels)  # (N*H'*W', O)
    for some in blocks(samples, rows_at_once // max(height * width, 1)):
        for lines in blocks(height, height if some.stop - some.start > 1 else rows_at_once // max(width, 1)):
            first = (some.start * height + lines.start) * width
            rows = slice(first, first + (some.stop - some.start) * (lines.stop - lines.start) * width)
            parts = [tap[some, lines] for tap in taps]
            if len(parts) == 1 and parts[0].is_contiguous():
                patches = parts[0]  # a 1x1 convolution reads the image itself
            else:
                patches = scratch("patches", (*parts[0].shape[:3], weight.shape[1]), torch.int8)
                torch.cat(parts, -1, out=patches)
            row_scale = None if scale is None else scale[rows]
            _product_into(patches.view(-1, weight.shape[1]), row_scale, weight, weight_scale, bias, flat[rows])


def _taps(image: Tensor, geometry: Geometry) -> list[Tensor]:
    """For each kernel position the pixels it meets: kh*kw views (N, H', W', C) of the padded image (N, H, W, C)."""
    kernel_size, stride, dilation, _ = geometry
    spans = [(k - 1) * d for k, d in zip(kernel_size, dilation, strict=True)]
    starts = [range(0, k * d, d) for k, d in zip(kernel_size, dilation, strict=True)]
    rows, columns = (image.shape[axis + 1] - spans[axis] for axis in (0, 1))
    return [image[:, i : i + rows : stride[0], j : j + columns : stride[1]] for i in starts[0] for j in starts[1]]


def _grouped_conv(
    image: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    geometry: Geometry,
) -> Tensor:
    """Float32 holds the sums of up to 1040 int8 products exactly, which covers depthwise and most grouped kernels."""
    kernel_size, stride, dilation, groups = geometry
    weight = from_rows(weight, (weight.shape[0], image.shape[3] // groups, *kernel_size)).float()
    sums = F.conv2d(image.permute(0, 3, 1, 2).float(), weight, None, stride, 0, dilation, groups)
    y = (sums if scale is None else sums * scale.view(-1, 1, 1, 1)) * weight_scale.float().view(-1, 1, 1)
    return (y if bias is None else y + bias.float().view(-1, 1, 1)).to(dtype)


def _int_mm(a: Tensor, b: Tensor) -> Tensor:
    """`torch._int_mm`; on CUDA padded to what it takes there: more than 16 rows, other sizes multiples of 8."""
    if not a.is_cuda:
        return torch._int_mm(a, b) if has_int8_products() else exact_product(a, b)
    b = b.t().contiguous().t()  # some columns of a split weight
    rows, inner, columns = a.shape[0], a.shape[1], b.shape[1]
    if inner % 8 or rows <= 16:
        a = F.pad(a, (0, -inner % 8, 0, max(0, 24 - rows)))
    if inner % 8 or columns % 8:
        b = F.pad(b.t(), (0, -inner % 8, 0, -columns % 8)).t()
    return torch._int_mm(a, b)[:rows, :columns]


def _plain_bias(bias: Tensor | None) -> Tensor | None:
    """Mixed dtypes are slow; and a bias that asks for gradients is refused where results are written in place."""
    return None if bias is None else bias.detach().float()


def blocks(size: int, step: int) -> Iterator[slice]:
    step = max(step, 1)
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
