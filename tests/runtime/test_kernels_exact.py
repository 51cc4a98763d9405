"""Integer products by float arithmetic: the same integers, whichever way the machine is given."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import Mock

import pytest
import torch

from dacc.runtime import kernels_int8
from dacc.runtime.kernels_exact import (
    EXACT,
    HELD,
    _tried,
    exact_convolution,
    exact_product,
    exact_product_into,
    has_int8_products,
)
from dacc.runtime.kernels_int8 import conv2d_int8_dynamic, linear_int8_dynamic


@pytest.mark.parametrize("features", [1, 72, EXACT, EXACT + 1, 3 * EXACT + 5])
@pytest.mark.parametrize("extreme", [True, False])
def test_sums_are_those_of_integer_arithmetic(features: int, extreme: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-128, 128, (9, features), generator=generator, dtype=torch.int8)
    b = torch.randint(-127, 128, (17, features), generator=generator, dtype=torch.int8)
    if extreme:
        a[:], b[:] = -128, -127
    wanted = a.long() @ b.long().T
    assert torch.equal(exact_product(a, b.t()).long(), wanted)
    output = torch.empty(9, 17)
    exact_product_into(a, b, output)
    assert torch.equal(output, wanted.int().float())


def test_the_most_extreme_sum_of_one_piece_is_held_exactly() -> None:
    a = torch.full((2, EXACT), -128, dtype=torch.int8)
    assert exact_product(a, a.t()).tolist() == [[EXACT * 2**14] * 2] * 2


@pytest.mark.parametrize("channels", [1, 113, 114, 300])  # 113 channels of nine pixels are sums of 1017 products
@pytest.mark.parametrize("extreme", [True, False])
@pytest.mark.parametrize(("stride", "dilation"), [((1, 1), (1, 1)), ((2, 1), (1, 2))])
def test_convolutions_are_those_of_integer_arithmetic(
    channels: int, extreme: bool, stride: tuple[int, int], dilation: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(-128, 128, (2, 9, 8, channels), generator=generator, dtype=torch.int8)
    weight = torch.randint(-127, 128, (5, 9 * channels), generator=generator, dtype=torch.int8)
    if extreme:
        image[:], weight[:] = -128, -127
        image[0, 3, 3, 0] = -127  # an odd sum, which float32 rounds once it is too long
    kernel = weight.view(5, 3, 3, channels).permute(0, 3, 1, 2)
    wanted = torch.conv2d(image.permute(0, 3, 1, 2).double(), kernel.double(), None, stride, 0, dilation)
    found = exact_convolution(image, weight, (3, 3), stride, dilation)
    assert torch.equal(found, wanted.permute(0, 2, 3, 1).int().float())


def test_a_convolution_is_cut_where_float32_does_not_hold_its_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    convolve = Mock(wraps=torch.nn.functional.conv2d)
    monkeypatch.setattr("dacc.runtime.kernels_exact.F.conv2d", convolve)
    weight = torch.zeros(2, 9 * 130, dtype=torch.int8)
    image = torch.full((1, 3, 3, 130), -128, dtype=torch.int8)
    weight[1, : HELD // 128 // 127] = 127  # the most that is held
    weight[1, -1] = HELD // 128 % 127
    exact_convolution(image, weight, (3, 3), (1, 1), (1, 1))
    assert convolve.call_count == 1
    weight[0] = 127
    exact_convolution(image, weight, (3, 3), (1, 1), (1, 1))
    assert convolve.call_count == 1 + 2


@pytest.mark.parametrize("images", [2, 0.5])
@pytest.mark.parametrize(("stride", "dilation"), [((1, 1), (1, 1)), ((2, 1), (1, 2)), ((1, 2), (2, 1))])
def test_large_images_are_convolved_in_parts(
    monkeypatch: pytest.MonkeyPatch, images: float, stride: tuple[int, int], dilation: tuple[int, int]
) -> None:
    monkeypatch.setattr(kernels_int8, "has_int8_products", lambda: False)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5, 64, 9, 8, generator=generator)
    weight = torch.randint(-127, 128, (1, 9 * 64), generator=generator, dtype=torch.int8)
    shape = {"kernel_size": (3, 3), "padding": (1, 1), "stride": stride, "dilation": dilation}
    with torch.no_grad():
        whole = conv2d_int8_dynamic(x, weight, torch.ones(1), **shape)
        allowed = int(images * whole[0].numel() * stride[0] * stride[1] * 64)
        monkeypatch.setattr(kernels_int8, "_PRODUCT_BLOCK", allowed)
        convolve = Mock(wraps=exact_convolution)
        monkeypatch.setattr(kernels_int8, "exact_convolution", convolve)
        assert torch.equal(conv2d_int8_dynamic(x, weight, torch.ones(1), **shape), whole)
    counts = [len(call.args[0]) for call in convolve.call_args_list]
    assert counts == [2, 2, 1] if images == 2 else set(counts) == {1} and len(counts) >= 10


def test_the_machine_is_tried_once() -> None:
    _tried.cache_clear()
    assert has_int8_products() == has_int8_products()
    assert _tried.cache_info().misses == 1


@pytest.fixture(params=[True, False], ids=["with gradients", "in reused memory"])
def grad(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether inputs ask for gradients, which takes the functional form."""
    with torch.set_grad_enabled(request.param):
        yield request.param


def test_layers_give_the_same_bits_either_way(monkeypatch: pytest.MonkeyPatch, grad: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 130, 7, 7, generator=generator, requires_grad=grad)
    tokens = torch.randn(3, 5, 1170, generator=generator, requires_grad=grad)
    weight = torch.randint(-127, 128, (24, 1170), generator=generator, dtype=torch.int8)
    scale, bias = torch.rand(24, generator=generator), torch.randn(24, generator=generator)
    found = []
    for fast in (True, False):
        monkeypatch.setattr(kernels_int8, "has_int8_products", lambda fast=fast: fast)
        image = conv2d_int8_dynamic(x, weight, scale, bias, kernel_size=(3, 3), padding=(1, 1))
        found.append((image, linear_int8_dynamic(tokens + 0, weight, scale, bias)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_compiled_layers_take_the_way_of_the_machine() -> None:
    x, weight = torch.randn(4, 64), torch.randint(-127, 128, (8, 64), dtype=torch.int8)
    compiled = torch.compile(linear_int8_dynamic, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, weight, torch.ones(8)), linear_int8_dynamic(x, weight, torch.ones(8)))
