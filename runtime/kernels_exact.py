"""Products of 8-bit integers on processors without instructions for them, where `torch._int_mm` takes twenty times as
long as a float product. Float32 holds every integer up to 2^24, so the sums of up to 1024 products of int8 values come
out of a float product exactly, in whatever order it adds; longer rows are multiplied piece by piece, and the pieces are
added as int32. Convolutions are cut likewise, unless their weights are small enough to bound all sums. The integers are
those of `torch._int_mm`, bit for bit.

Letters: M rows, K inner size, O columns of the result."""

import time
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from .kernels_scratch import scratch

HELD = 2**24  # float32 holds all integers up to here
EXACT = 1024  # products of -128..127 with -128..127 whose sum float32 holds: 1024 * 128 * 128 = 2^24
ROUNDED_AT_ONCE = 2**19  # values made float at once: larger saves calls, smaller keeps them in cache
_PROBE = 128, 512, 128  # M, K, O
_CLEARLY = 2.0  # so many times slower, integer products are left alone


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_int8_products() -> bool:
    """Whether the CPU multiplies int8 about as fast as float32; told by a few milliseconds of trying, once a process.
    The answer changes no result."""
    return _tried()


@cache
def _tried() -> bool:
    rows, inner, columns = _PROBE
    a, b = torch.ones(rows, inner, dtype=torch.int8), torch.ones(columns, inner, dtype=torch.int8).t()
    floats = a.float(), b.float()
    with torch.inference_mode():
        return _least_seconds(lambda: torch._int_mm(a, b)) < _CLEARLY * _least_seconds(lambda: torch.mm(*floats))


def _least_seconds(work: Callable[[], object]) -> float:
    """The shortest of some runs, after one that does not count."""
    work()
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """(M, K) int8, (K, O) int8 -> (M, O) int32."""
    pieces = [slice(start, start + EXACT) for start in range(0, max(a.shape[1], 1), EXACT)]
    total = (a[:, pieces[0]].float() @ b[pieces[0]].float()).int()
    for piece in pieces[1:]:
        total = total + (a[:, piece].float() @ b[piece].float()).int()
    return total


def exact_product_into(a: Tensor, weight: Tensor, output: Tensor) -> None:
    """(M, K) int8, (O, K) int8 -> into `output`, (M, O) float32: the int32 sums rounded to float32."""
    features = a.shape[1]
    if features > EXACT:
        sums = scratch("exact_sums", tuple(output.shape), torch.int32).zero_()
    for start in range(0, max(features, 1), EXACT):
        piece = slice(start, start + EXACT)
        columns = _as_floats("exact_weight", weight[:, piece]).t()
        for rows in _row_blocks(a.shape[0], min(features, EXACT)):
            torch.mm(_as_floats("exact_rows", a[rows, piece]), columns, out=output[rows])
        if features > EXACT:
            sums += scratch("exact_piece", tuple(output.shape), torch.int32).copy_(output)
    if features > EXACT:
        output.copy_(sums)


def exact_convolution(
    image: Tensor, weight: Tensor, kernel_size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> Tensor:
    """Padded (N, H, W, C) int8, (O, K) int8 with channels innermost -> (N, H', W', O) float32: the int32 sums rounded
    to float32. A float convolution reads each pixel once, where the patches of a product would repeat it kernel-size
    times."""
    channels = image.shape[3]
    kernels = weight.view(weight.shape[0], *kernel_size, channels)
    at_once = channels if _is_held(weight) else max(1, EXACT // (kernel_size[0] * kernel_size[1]))
    pieces = [slice(start, start + at_once) for start in range(0, channels, at_once)]

    def sums(piece: slice) -> Tensor:
        pixels = _as_floats("exact_image", image[..., piece]).permute(0, 3, 1, 2)
        kernel = _as_floats("exact_kernel", kernels[..., piece]).permute(0, 3, 1, 2)
        return F.conv2d(pixels, kernel, None, stride, 0, dilation).permute(0, 2, 3, 1)

    if len(pieces) == 1:
        return sums(pieces[0])
    total = sums(pieces[0]).int()
    for piece in pieces[1:]:
        total += sums(piece).int()
    return total.float()


def _is_held(weight: Tensor) -> bool:
    """Whether float32 holds every sum that a row of (O, K) int8 can give with 8-bit inputs."""
    return bool(weight.float().abs().sum(1).max() * 128 <= HELD)


def _row_blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, ROUNDED_AT_ONCE // max(width, 1))
    return (slice(start, start + step) for start in range(0, rows, step))


def _as_floats(name: str, integers: Tensor) -> Tensor:
    return scratch(name, tuple(integers.shape), torch.float32).copy_(integers)
