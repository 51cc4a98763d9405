"""Integer products of inputs with zero points that are found at each call, against slow, obvious arithmetic."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dacc.core.scheme import Scheme
from dacc.quant.methods.rtn import RTNConfig, quantize
from dacc.quant.simulate import round_dynamic, rounding_of
from dacc.runtime import kernels_grouped, kernels_int8, kernels_round
from dacc.runtime.kernels_grouped import linear_int8_grouped
from dacc.runtime.kernels_int8 import conv2d_int8_dynamic, linear_int8_dynamic
from dacc.runtime.kernels_round import quantize_rows
from dacc.runtime.layers import LAYER_CLASSES

OFFSET = Scheme(bits=8, act_bits=8, act_mode="dynamic", act_offset=True)


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(params=["in place", "functional"])
def form(request, monkeypatch):
    if request.param == "functional":
        for module in (kernels_int8, kernels_round, kernels_grouped):
            monkeypatch.setattr(module, "may_use_scratch", lambda _: False)


def stands_for(x: torch.Tensor, dims: tuple[int, ...], qmax: int) -> torch.Tensor:
    """The values of the integers of `x`, with one range over `dims`, in float64."""
    low, high = x.amin(dims, keepdim=True).clamp_max(0), x.amax(dims, keepdim=True).clamp_min(0)
    step = (high - low).double() / (2 * qmax + 1)
    lowest = (low / step).round()
    return ((x / step).round() - lowest).clamp_max(2 * qmax + 1).add(lowest) * step


def integers(rows: int, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(-127, 128, (rows, features)).to(torch.int8), torch.rand(rows) + 0.1


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).norm() < 2e-6 * expected.norm()


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("qmax", [127, 7])
@pytest.mark.parametrize("entering", [F.silu, torch.abs, torch.neg], ids=lambda function: function.__name__)
def test_linears_and_convolutions_equal_their_formula(qmax, entering):
    x, (weight, scale), bias = entering(torch.randn(3, 20, 65)), integers(33, 65), torch.randn(33)
    found = linear_int8_dynamic(x, weight, scale, bias, qmax=qmax, row_sums=weight.sum(1, dtype=torch.int32))
    own = weight.double() * scale.double()[:, None]
    assert_near(found, F.linear(stands_for(x, (-1,), qmax), own, bias.double()))

    image, (weight, scale) = entering(torch.randn(3, 8, 9, 10)), integers(12, 72)
    shape = {"kernel_size": (3, 3), "padding": (1, 1), "stride": (2, 1), "qmax": qmax}
    found = conv2d_int8_dynamic(image, weight, scale, row_sums=weight.sum(1, dtype=torch.int32), **shape)
    own = (weight.double() * scale.double()[:, None]).view(12, 3, 3, 8).permute(0, 3, 1, 2)
    assert_near(found, F.conv2d(stands_for(image, (1, 2, 3), qmax), own, None, (2, 1), 1))


@pytest.mark.usefixtures("form")
def test_groups_have_zero_points_of_their_own():
    x, (weight, _), scale = F.silu(torch.randn(5, 7, 64)), integers(33, 64), torch.rand(33, 4)
    sums = weight.view(33, 4, 16).sum(-1, dtype=torch.int32).t()
    found = linear_int8_grouped(x, weight, scale, group_size=16, row_sums=sums)
    own = (weight.view(33, 4, 16).double() * scale.double()[..., None]).view(33, 64)
    assert_near(found, F.linear(stands_for(x.view(5, 7, 4, 16), (-1,), 127).view(5, 7, 64), own))


@pytest.mark.usefixtures("form")
def test_rows_that_do_not_cross_zero_and_rows_of_zeros():
    x = torch.stack([torch.zeros(6), torch.linspace(2, 3, 6), -torch.linspace(2, 3, 6), torch.full((6,), 1e-40)])
    found, scale, zero = quantize_rows(x, offset=True)
    assert torch.equal(scale[[0, 3]], torch.ones(2, 1))
    assert zero.flatten().tolist() == [-128, -128, 127, -128]  # 0 is always one of the values, and here an extreme one
    torch.testing.assert_close((found.float() - zero) * scale, x, rtol=0, atol=3 / 255 / 2)


def layer_of(kind: str) -> tuple[nn.Module, torch.Tensor]:
    if kind == "linear":
        return nn.Linear(48, 20), F.gelu(torch.randn(3, 7, 48))
    if kind == "grouped convolution":
        return nn.Conv2d(16, 20, 3, padding=1, groups=4), F.silu(torch.randn(3, 16, 6, 6))
    return nn.Conv2d(16, 20, 3 if kind == "3x3" else 1, padding="same"), F.silu(torch.randn(3, 16, 6, 6))


@pytest.mark.parametrize("split", [None, 8])
@pytest.mark.parametrize("kind", ["linear", "3x3", "1x1", "grouped convolution"])
def test_a_layer_gives_what_the_simulation_gives(kind, split):
    layer, x = layer_of(kind)
    if split and kind not in ("linear", "1x1"):
        pytest.skip("only linears and 1x1 convolutions have two parts")
    scheme = OFFSET.model_copy(update={"split": split})
    weight = quantize(layer.weight.detach(), scheme, RTNConfig())
    quantized = LAYER_CLASSES[type(layer)](layer, scheme)
    quantized.store_weight(weight)
    layer.weight.copy_(weight.dequantize())
    assert_near(quantized(x), layer(rounding_of(scheme, layer, None)(x)))


@pytest.mark.parametrize("per_sample", [False, True])
def test_one_sided_inputs_lose_less(per_sample):
    x = F.silu(torch.randn(4, 16, 8, 8))
    plain, offset = (
        (round_dynamic(x, OFFSET.model_copy(update={"act_offset": has}), per_sample=per_sample) - x).norm()
        for has in (False, True)
    )
    assert offset < 0.7 * plain
