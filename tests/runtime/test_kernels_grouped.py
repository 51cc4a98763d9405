"""Integer products of linears with an activation scale for each token and group, against sums in 64-bit integers."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from dacc.core.config import build_config
from dacc.core.errors import ConfigError
from dacc.core.scheme import Scheme
from dacc.runtime import kernels_exact, kernels_grouped
from dacc.runtime.kernels_grouped import linear_int8_grouped
from dacc.runtime.layers import QuantizedLinear, set_prefer_, swap_layers_
from dacc.runtime.weight import QuantizedWeight

PER_GROUP = {"act_mode": "per-group", "act_group_size": 16}


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def example(tokens=7, features=48, outputs=20, group_size=16):
    """Inputs whose groups differ much in size, one of them zero, and int8 weights with scales."""
    groups = features // group_size
    x = torch.randn(tokens, groups, group_size) * 10 ** torch.linspace(-2, 2, groups).view(-1, 1)
    x[2, 0] = 0
    weight = torch.randint(-127, 128, (outputs, features), dtype=torch.int8)
    return x.flatten(1), weight, torch.rand(outputs, groups) + 0.1, torch.randn(outputs)


def slowly(x, weight, scale, bias, group_size, qmax):
    """One output at a time, the sums in integers."""
    y = bias.double().repeat(len(x), 1)
    for token in range(len(x)):
        for group in range(scale.shape[1]):
            some = slice(group * group_size, (group + 1) * group_size)
            step = float(x[token, some].abs().max()) / qmax or 1.0
            integers = (x[token, some].double() / step).round().long()
            for row in range(len(weight)):
                y[token, row] += int((integers * weight[row, some].long()).sum()) * step * float(scale[row, group])
    return y


def distance(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("group_size", [4, 16, 48])
@pytest.mark.parametrize("bits", range(4, 9))
def test_products_are_exact_group_by_group(bits, group_size):
    x, weight, scale, bias = example(group_size=group_size)
    qmax = 2 ** (bits - 1) - 1
    found = linear_int8_grouped(x, weight, scale, bias, group_size=group_size, qmax=qmax)
    assert distance(found, slowly(x, weight, scale, bias, group_size, qmax)) < 1e-6
    without = linear_int8_grouped(x.view(7, 1, 48), weight, scale, group_size=group_size, qmax=qmax)
    assert distance(without.view(7, 20) + bias, found.double()) < 1e-6


def test_one_group_is_one_scale_per_token():
    x, weight, scale, _ = example(group_size=48)
    scheme = Scheme(bits=8, act_bits=8, act_mode="dynamic")
    layer = QuantizedLinear(nn.Linear(48, 20, bias=False), scheme)
    layer.store_weight(QuantizedWeight(scheme, (20, 48), weight.view(torch.uint8), scale))
    assert torch.equal(linear_int8_grouped(x, weight, scale, group_size=48), layer(x))


@pytest.mark.parametrize("integers", [True, False])
def test_the_way_of_the_products_changes_nothing(integers, monkeypatch):
    x, weight, scale, bias = example()
    expected = linear_int8_grouped(x, weight, scale, bias, group_size=16)
    monkeypatch.setattr(kernels_exact, "_tried", lambda: integers)
    assert torch.equal(linear_int8_grouped(x, weight, scale, bias, group_size=16), expected)


@pytest.mark.parametrize("tokens", [3, 64, 65])
def test_many_tokens_are_treated_in_blocks(tokens, monkeypatch):
    x, weight, scale, bias = example(tokens=tokens)
    expected = linear_int8_grouped(x, weight, scale, bias, group_size=16)
    monkeypatch.setattr(kernels_grouped, "_OUTPUT_BLOCK", 20 * 16)
    assert torch.equal(linear_int8_grouped(x, weight, scale, bias, group_size=16), expected)


def test_no_tokens_give_no_outputs():
    _, weight, scale, bias = example()
    assert linear_int8_grouped(torch.zeros(2, 0, 48), weight, scale, bias, group_size=16).shape == (2, 0, 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_rounded_as_wide_ones(dtype):
    x, weight, scale, bias = example()
    x = x.to(dtype)
    found = linear_int8_grouped(x, weight, scale, bias, group_size=16)
    assert found.dtype == dtype
    assert torch.equal(found, linear_int8_grouped(x.float(), weight, scale, bias, group_size=16).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_code_and_code_with_gradients_give_the_same(dtype):
    torch.compiler.reset()
    x, weight, scale, bias = example()
    x = x.to(dtype)
    expected = linear_int8_grouped(x, weight, scale, bias, group_size=16)
    compiled = torch.compile(linear_int8_grouped, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, weight, scale, bias, group_size=16), expected)
    with torch.enable_grad():
        assert torch.equal(linear_int8_grouped(x.requires_grad_(), weight, scale, bias, group_size=16), expected)


def test_a_tensor_that_several_layers_read_is_rounded_anew_for_other_groups():
    x, weight, scale, bias = example()
    for group_size in (16, 48, 8, 16):
        scales = scale[:, :1].expand(20, 48 // group_size)
        found = linear_int8_grouped(x, weight, scales, bias, group_size=group_size)
        assert distance(found, slowly(x, weight, scales, bias, group_size, 127)) < 1e-6


@pytest.mark.parametrize("split", [None, 32])
@pytest.mark.parametrize("prefer", ["memory", "speed"])
def test_scales_of_channels_and_of_parts_serve_all_their_groups(split, prefer):
    scheme = Scheme(bits=5, act_bits=8, split=split, **PER_GROUP)
    x, weight, scale, bias = example()
    codes = weight.clamp(-16, 15)
    scale = scale[:, : scheme.parts].contiguous()
    layer = QuantizedLinear(nn.Linear(48, 20), scheme)
    layer.bias.copy_(bias)
    layer.store_weight(QuantizedWeight.from_codes(codes, scheme, (20, 48), scale=scale))
    set_prefer_(layer, prefer)
    by_group = scale.expand(20, 3) if split is None else scale[:, [0, 0, 1]]
    for _ in range(2):
        assert distance(layer(x), slowly(x, codes, by_group, bias, 16, 127)) < 1e-6
    assert distance(functional.linear(x, layer.weight, bias), layer(x).double()) < 0.02


@pytest.mark.parametrize("layer", [nn.Linear(40, 8), nn.Conv2d(16, 8, 1)], ids=["linear", "convolution"])
def test_a_layer_without_equal_groups_is_refused(layer):
    with pytest.raises(ConfigError, match="Only linears have activation scales for groups.*Use act_mode dynamic"):
        swap_layers_(nn.Sequential(layer), {"0": build_config(Scheme, bits=8, act_bits=8, **PER_GROUP)})
