"""NVFP4 in plain torch, against tables written out from the definition of its numbers."""

import copy
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn import functional

from dacc.core.config import build_config
from dacc.core.errors import ConfigError
from dacc.core.scheme import Scheme
from dacc.quant.grid import find_grid
from dacc.runtime.layers import QuantizedLinear, set_prefer_, swap_layers_
from dacc.runtime.nvfp4 import e2m1_codes, e2m1_values, e4m3_bytes, e4m3_values, nvfp4_rows, round_e2m1
from dacc.runtime.packing import pack_codes
from dacc.runtime.weight import state_shapes

NVFP4 = Scheme(format="nvfp4", bits=4, group_size=16)


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def number(code, exponents, mantissas):
    """The value of a small float: sign, exponent and mantissa bits, numbers without a leading 1 at exponent 0."""
    sign = -1 if code >> (exponents + mantissas) else 1
    exponent, mantissa = (code >> mantissas) & (2**exponents - 1), code & (2**mantissas - 1)
    bias = 2 ** (exponents - 1) - 1
    share = Fraction(mantissa, 2**mantissas)
    return sign * (
        share * Fraction(2) ** (1 - bias) if exponent == 0 else (1 + share) * Fraction(2) ** (exponent - bias)
    )


def nearest(value, codes, exponents, mantissas):
    """The nearest of some codes; of two that are equally near, the even one."""
    return min(codes, key=lambda code: (abs(number(code, exponents, mantissas) - value), code % 2))


def test_the_table_of_codes_is_that_of_the_format():
    found = e2m1_values(pack_codes(torch.arange(16).view(1, 16), 4))[0].tolist()
    assert found == [float(number(code, 2, 1)) for code in range(16)]
    assert found[:8] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_every_code_comes_back_and_both_zeros_are_one():
    packed = pack_codes(torch.arange(16).view(1, 16), 4)
    assert e2m1_codes(e2m1_values(packed))[0].tolist() == [*range(8), 0, *range(9, 16)]


def test_values_go_to_the_nearest_number_and_ties_to_the_even_code():
    values = torch.arange(0, 8 * 64 + 1) / 64  # all ties are among them, and what is beyond 6
    expected = [float(number(nearest(Fraction(value), range(8), 2, 1), 2, 1)) for value in values.tolist()]
    assert round_e2m1(values).tolist() == expected
    assert round_e2m1(-values).tolist() == [-value for value in expected]
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0])
    assert round_e2m1(ties).tolist() == [0, 1, 1, 2, 2, 4, 4, 6]
    assert e2m1_codes(round_e2m1(ties)).remainder(2).tolist() == [0, 0, 0, 0, 0, 0, 0, 1]  # the last is no tie


def test_scales_of_blocks_are_e4m3():
    positive = range(1, 127)
    assert e4m3_values(torch.arange(127, dtype=torch.uint8)).tolist() == [
        float(number(code, 4, 3)) for code in range(127)
    ]
    assert float(number(126, 4, 3)) == 448
    values = torch.cat([torch.logspace(-4, 3, 50), torch.tensor([float(number(code, 4, 3)) for code in positive])])
    expected = [nearest(Fraction(value), positive, 4, 3) for value in values.tolist()]
    assert e4m3_bytes(values).tolist() == expected
    assert e4m3_bytes(torch.tensor([0.0, 1e9])).tolist() == [1, 126]


def test_a_row_is_the_product_of_code_block_scale_and_tensor_scale():
    codes, blocks = torch.randint(0, 16, (3, 48)), torch.randint(1, 127, (3, 3), dtype=torch.uint8)
    found = nvfp4_rows(pack_codes(codes, 4), torch.full((1, 1), 0.0625 * 1.5), blocks)
    for row in range(3):
        for column in range(48):
            scale = number(int(blocks[row, column // 16]), 4, 3) * Fraction(3, 32)
            assert float(found[row, column]) == float(number(int(codes[row, column]), 2, 1) * scale)


def made(scheme=NVFP4, plain=None):
    plain = plain or nn.Linear(48, 20)
    layer = QuantizedLinear(plain, scheme)
    grid = find_grid(plain.weight, scheme, search=True)
    layer.store_weight(grid.pack(grid.nearest(plain.weight), (20, 48)))
    return plain, layer, torch.randn(3, 7, 48)


@pytest.mark.parametrize("prefer", ["memory", "speed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [3, 40])
def test_a_layer_multiplies_the_dequantized_weight(prefer, dtype, tokens):
    plain, layer, _ = made()
    layer.to(dtype)
    set_prefer_(layer, prefer)
    x = torch.randn(tokens, 48).to(dtype)
    for _ in range(2):
        assert torch.equal(layer(x), functional.linear(x, layer.weight, plain.bias.to(dtype)))
    assert 0.02 < float((layer.weight.float() - plain.weight).norm() / plain.weight.norm()) < 0.12


def test_compiled_code_gives_the_same():
    torch.compiler.reset()
    _, layer, x = made()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_the_state_is_two_codes_a_byte_and_comes_back_bit_for_bit():
    _, layer, x = made()
    stored = {
        "qweight": ((20, 24), torch.uint8),
        "scale": ((1, 1), torch.float32),
        "group_scale": ((20, 3), torch.uint8),
    }
    assert state_shapes(NVFP4, (20, 48)) == stored
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert {name: (tuple(before[name].shape), before[name].dtype) for name in stored} == stored
    assert layer.memory_bytes() == 20 * 24 + 4 + 20 * 3 + 4 * 20
    layer.half()
    assert all(torch.equal(layer.state_dict()[name], before[name]) for name in stored)
    other = made(plain=nn.Linear(48, 20))[1]
    other(x)
    other.load_state_dict(copy.deepcopy(before), assign=True)
    assert torch.equal(other.weight, layer.float().weight)


@pytest.mark.parametrize("layer", [nn.Conv2d(16, 8, 1), nn.Linear(40, 8), nn.Embedding(16, 16)], ids=repr)
def test_a_layer_that_has_no_such_blocks_is_refused(layer):
    with pytest.raises(ConfigError, match="NVFP4 is for linears.*Use integers there"):
        swap_layers_(nn.Sequential(layer), {"0": build_config(Scheme, format="nvfp4", bits=4, group_size=16)})
