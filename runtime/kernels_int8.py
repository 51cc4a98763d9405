"""Linear and convolution on int8 weights and int8 activations, exact in int32:

    q_x = round(x / s_x)          one s_x per token (linear) or per sample (convolution), see kernels_round.py
    y   = (q_x . q_w) * s_x * s_w + bias

With zero points z_x:

    y   = (q_x . q_w - z_x * sum(q_w)) * s_x * s_w + bias

Two forms give the same integers: a functional one (torch.compile fuses it; CUDA; autograd), and one for eager CPU that
works in blocks, in reused memory. Products run on plain (O, K) int8 rows: no second copy of the weight.
Letters: M rows (tokens or pixels), K inner size, O out_features, R rows of one block, N samples, C in_channels, H W."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .kernels_exact import exact_convolution, exact_product, exact_product_into, has_int8_products
from .kernels_round import blocks, quantize_rows, quantize_tokens
from .kernels_scratch import may_use_scratch, scratch
from .weight import from_rows

_PRODUCT_BLOCK = 2**22  # int32 sums at once (16 MB): larger saves repacking the weight, smaller saves memory
_PATCH_BLOCK = 2**24  # bytes of convolution patches at once: likewise


class Geometry(NamedTuple):
    """How a kernel lies on an image that is already padded."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


class Offset(NamedTuple):
    """What zero points take from the integer sums: their product with the sums of the weight's rows."""

    zero: Tensor  # (M, 1) float32, or (N, 1) before a convolution spreads it over pixels
    row_sums: Tensor  # (O,) int32


class _Ending(NamedTuple):
    """What makes outputs of integer sums."""

    scale: Tensor | None  # (M, 1) float32, or None for a scale of 1
    weight_scale: Tensor  # (O,) float32
    bias: Tensor | None  # (O,) float32
    offset: Offset | None

    def write(self, y: Tensor, output: Tensor, rows: slice) -> None:
        """Sums (R, O) float32, which are overwritten, into some rows of (M, O)."""
        if self.offset is not None:
            y.addcmul_(self.offset.zero[rows], self.offset.row_sums.float(), value=-1)
        if self.scale is not None:
            y.mul_(self.scale[rows])
        output = output[rows]
        written = output if output.dtype is torch.float32 else y  # other dtypes would be converted value by value
        if self.bias is None:
            torch.mul(y, self.weight_scale, out=written)
        else:
            torch.addcmul(self.bias, y, self.weight_scale, out=written)
        if written is y:
            output.copy_(y)


def linear_int8_dynamic(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    qmax: int = 127,
    row_sums: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """(..., K) float, (O, K) int8, (O,) float -> (..., O) of `dtype` (of `x` by default), activations quantized per
    token.

    Args:
        row_sums: (O,) int32, sums of the integers in each row of the weight; given, tokens have zero points.
    """
    integers, scale, zero = quantize_tokens(x, qmax, offset=row_sums is not None)
    offset = None if zero is None or row_sums is None else Offset(zero, row_sums)
    y = int8_product(integers, scale, weight, weight_scale, bias, dtype or x.dtype, offset)
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
    row_sums: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """(N, C, H, W) float, (O, K) int8 with channels innermost, (O,) float -> (N, O, H', W') in channels_last,
    activations quantized per sample.

    Args:
        row_sums: (O,) int32, as for linears; given, samples have zero points.
    """
    pixels = x.permute(0, 2, 3, 1)  # (N, H, W, C)
    integers, scale, zero = quantize_rows(pixels.flatten(1), qmax, offset=row_sums is not None)
    integers = _pad(integers.view(pixels.shape), zero, padding)
    offset = None if zero is None or row_sums is None else Offset(zero, row_sums)
    geometry = Geometry(kernel_size, stride, dilation, groups)
    return int8_convolution(integers, scale, weight, weight_scale, bias, dtype or x.dtype, geometry, offset)


def _pad(image: Tensor, zero: Tensor | None, padding: tuple[int, int]) -> Tensor:
    """(N, H, W, C) int8 with what stands for zero around: 0, or the zero points (N, 1)."""
    around = (0, 0, padding[1], padding[1], padding[0], padding[0])
    if zero is None or not any(padding):
        return F.pad(image, around)
    point = zero.to(torch.int8).view(-1, 1, 1, 1)
    return F.pad(image - point, around) + point  # differences wrap around, and back


def int8_convolution(
    integers: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    geometry: Geometry,
    offset: Offset | None = None,
) -> Tensor:
    """Padded (N, H, W, C) int8, (N, 1) float32 or None for a scale of 1, (O, K) int8, (O,) float32 -> (N, O, H', W')
    of `dtype`."""
    if geometry.groups > 1:
        return _grouped_conv(integers, scale, weight, weight_scale, bias, dtype, geometry, offset)
    taps = _taps(integers, geometry)
    out_shape = (*taps[0].shape[:3], weight.shape[0])  # (N, H', W', O)
    pixels = out_shape[1] * out_shape[2]
    if scale is not None:
        scale = scale.repeat_interleave(pixels, 0)  # (N*H'*W', 1)
    if offset is not None:
        offset = offset._replace(zero=offset.zero.repeat_interleave(pixels, 0))
    if not _in_place(integers, scale, weight_scale):
        rows = torch.cat(taps, -1).view(-1, weight.shape[1])
        y = int8_product(rows, scale, weight, weight_scale, bias, dtype, offset)
        return y.view(out_shape).permute(0, 3, 1, 2)
    output = torch.empty(out_shape, dtype=dtype)
    ending = _Ending(scale, weight_scale.float(), _plain_bias(bias), offset)
    if has_int8_products() or len(taps) == 1:
        _conv_blocks(taps, weight, ending, output)
    else:
        _exact_conv_blocks(integers, geometry, weight, ending, output)
    return output.permute(0, 3, 1, 2)


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
    offset: Offset | None = None,
) -> Tensor:
    """(M, K) int8, (M, 1) float32 or None for a scale of 1, (O, K) int8, (O,) float32 -> (M, O) of `dtype`."""
    if not _in_place(integers, scale, weight_scale):
        y = _int_mm(integers, weight.t()).float()
        y = y if offset is None else y - offset.zero * offset.row_sums.float()
        y = (y if scale is None else y * scale) * weight_scale.float()
        return (y if bias is None else y + bias.float()).to(dtype)
    output = torch.empty(integers.shape[0], weight.shape[0], dtype=dtype)
    ending = _Ending(scale, weight_scale.float(), _plain_bias(bias), offset)
    for rows in blocks(integers.shape[0], _PRODUCT_BLOCK // max(weight.shape[0], 1)):
        _product_into(integers[rows], weight, ending, output, rows)
    return output


def _product_into(integers: Tensor, weight: Tensor, ending: _Ending, output: Tensor, rows: slice) -> None:
    """One block (R, K) of integers, into its `rows` of the whole output; the int32 sums become float32 where they
    lie."""
    sums = scratch("sums", (integers.shape[0], weight.shape[0]), torch.int32)
    y = sums.view(torch.float32)
    if has_int8_products():
        torch._int_mm(integers, weight.t(), out=sums)
        y.copy_(sums)
    else:
        exact_product_into(integers, weight, y)
    ending.write(y, output, rows)


def _conv_blocks(taps: list[Tensor], weight: Tensor, ending: _Ending, output: Tensor) -> None:
    """Gathers patches of some whole samples, or of some image rows of one, and multiplies them."""
    out_channels = output.shape[3]
    at_once = min(_PATCH_BLOCK // max(weight.shape[1], 1), _PRODUCT_BLOCK // max(out_channels, 1))
    for some, lines, rows in _parts(output.shape, at_once):
        parts = [tap[some, lines] for tap in taps]
        if len(parts) == 1 and parts[0].is_contiguous():
            patches = parts[0]  # a 1x1 convolution reads the image itself
        else:
            patches = scratch("patches", (*parts[0].shape[:3], weight.shape[1]), torch.int8)
            torch.cat(parts, -1, out=patches)
        _product_into(patches.view(-1, weight.shape[1]), weight, ending, output.view(-1, out_channels), rows)


def _exact_conv_blocks(image: Tensor, geometry: Geometry, weight: Tensor, ending: _Ending, output: Tensor) -> None:
    """Convolves some whole samples, or some image rows of one."""
    out_channels = output.shape[3]
    kernel_size, stride, dilation, _ = geometry
    floats = max(image.shape[3] * stride[0] * stride[1], out_channels, 1)  # for one pixel of the output
    for some, lines, rows in _parts(output.shape, _PRODUCT_BLOCK // floats):
        bottom = (lines.stop - 1) * stride[0] + (kernel_size[0] - 1) * dilation[0] + 1
        y = exact_convolution(image[some, lines.start * stride[0] : bottom], weight, kernel_size, stride, dilation)
        ending.write(y.reshape(-1, out_channels), output.view(-1, out_channels), rows)


def _parts(shape: torch.Size, at_once: int) -> Iterator[tuple[slice, slice, slice]]:
    """Of an output (N, H', W', O) so many pixels at once: samples, lines of them, and rows of the flat output."""
    samples, height, width, _ = shape
    for some in blocks(samples, at_once // max(height * width, 1)):
        for lines in blocks(height, height if some.stop - some.start > 1 else at_once // max(width, 1)):
            first = (some.start * height + lines.start) * width
            yield some, lines, slice(first, first + (some.stop - some.start) * (lines.stop - lines.start) * width)


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
    offset: Offset | None,
) -> Tensor:
    """Float32 holds the sums of up to 1040 int8 products exactly, which covers depthwise and most grouped kernels."""
    kernel_size, stride, dilation, groups = geometry
    weight = from_rows(weight, (weight.shape[0], image.shape[3] // groups, *kernel_size)).float()
    sums = F.conv2d(image.permute(0, 3, 1, 2).float(), weight, None, stride, 0, dilation, groups)
    if offset is not None:
        sums = sums - offset.zero.view(-1, 1, 1, 1) * offset.row_sums.float().view(-1, 1, 1)
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
