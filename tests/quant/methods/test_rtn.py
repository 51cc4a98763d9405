import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from dacc.core.config import build_config
from dacc.core.errors import ConfigError
from dacc.core.scheme import Scheme
from dacc.quant.methods.rtn import CONFIG, RTNConfig, quantize
from dacc.runtime.packing import unpack_codes
from dacc.runtime.weight import QuantizedWeight

DYNAMIC = {"act_bits": 8, "act_mode": "dynamic"}
SCHEMES = [
    Scheme(bits=4, group_size=16),
    Scheme(bits=4, group_size=16, symmetric=False),
    Scheme(bits=3, symmetric=False),
    Scheme(bits=8),
    Scheme(bits=2, group_size=16, symmetric=False),
    Scheme(bits=4, group_size=16, two_level=True, **DYNAMIC),
]
NAMED = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)


def example(shape=(6, 48), seed=0):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    weight.view(shape[0], -1)[1, :16] = 0  # a group of zeros
    weight.view(shape[0], -1)[2, :16].abs_()  # a group on one side of zero
    return weight


def half(value):
    return float(torch.tensor(value).half())


def slow(row, scheme):
    """Codes of one row by the formula, number by number, with the scales as they are stored."""
    size = scheme.group_size or len(row)
    groups = [row[start : start + size] for start in range(0, len(row), size)]
    low_code, high_code = scheme.code_range
    scales, zeros = [], []
    for group in groups:
        low, high = min(0.0, *group), max(0.0, *group)
        scale = max(high / high_code, low / low_code) if scheme.symmetric else (high - low) / high_code
        scales.append(scale)
        zeros.append(0 if scheme.symmetric or scale == 0 else round(-low / scale))
    if scheme.two_level:
        row_scale = max(scales) / 15 or 1.0
        scales = [half(row_scale) * min(15, max(1, round(scale / row_scale))) for scale in scales]
    else:
        scales = [half(scale) for scale in scales]
    return [
        [zero if scale == 0 else min(high_code, max(low_code, round(value / scale) + zero)) for value in group]
        for group, scale, zero in zip(groups, scales, zeros, strict=True)
    ]


@NAMED
@pytest.mark.parametrize("shape", [(6, 48), (6, 4, 3, 4)])
def test_formula_equals_slow_loops(scheme, shape):
    weight = example(shape)
    found = quantize(weight, scheme, RTNConfig(search="minmax"))
    codes = unpack_codes(found.qweight, scheme.bits, 48, signed=scheme.symmetric)
    rows = weight.movedim(1, -1).flatten(1)  # channels are neighbours
    expected = torch.tensor([slow(row, scheme) for row in rows.tolist()]).flatten(1)
    assert torch.equal(codes.int(), expected.int())
    assert found.shape == shape
    assert found.scale.dtype == torch.float16


@NAMED
def test_each_weight_has_the_code_nearest_to_it_under_the_stored_scale(scheme):
    weight = example()
    found = quantize(weight, scheme, RTNConfig())
    error = (found.dequantize() - weight).abs()
    codes = unpack_codes(found.qweight, scheme.bits, 48, signed=scheme.symmetric).short()
    for step in (-1, 1):
        other = (codes + step).clamp(*scheme.code_range)
        moved = QuantizedWeight.from_codes(
            other, scheme, (6, 48), scale=found.scale, zero_point=found.zero_point, group_scale=found.group_scale
        )
        assert (error <= (moved.dequantize() - weight).abs() + 1e-6).all()


@NAMED
def test_rank_of_the_search_is_no_worse_than_the_full_range(scheme):
    weight = example((32, 96)) ** 3
    errors = {
        search: float((quantize(weight, scheme, RTNConfig(search=search)).dequantize() - weight).square().sum())
        for search in ("minmax", "mse")
    }
    assert errors["mse"] <= errors["minmax"]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_more_bits_give_less_error(symmetric, group_size, search):
    weight = example((16, 64))
    errors = [
        float((quantize(weight, scheme, RTNConfig(search=search)).dequantize() - weight).norm())
        for scheme in (Scheme(bits=bits, symmetric=symmetric, group_size=group_size) for bits in range(2, 9))
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 * float(weight.norm())


@NAMED
def test_round_trip_through_a_file_is_bit_for_bit(scheme, tmp_path):
    found = quantize(example(), scheme, RTNConfig())
    save_file(found.tensors(), tmp_path / "w.safetensors")
    again = QuantizedWeight(scheme, (6, 48), **load_file(tmp_path / "w.safetensors"))
    assert torch.equal(again.dequantize(), found.dequantize())
    assert {name: value.dtype for name, value in again.tensors().items()} == {
        name: value.dtype for name, value in found.tensors().items()
    }


@NAMED
@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
def test_repeat_gives_the_same_bytes_however_rows_are_dealt(scheme, chunk, monkeypatch):
    first = quantize(example(), scheme, RTNConfig()).tensors()
    monkeypatch.setattr("dacc.quant.grid.ROWS_VALUES", chunk)
    for name, value in quantize(example(), scheme, RTNConfig()).tensors().items():
        assert torch.equal(value, first[name])


@NAMED
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type_is_taken_as_it_is(scheme, dtype):
    weight = example().to(dtype)
    expected = quantize(weight.float(), scheme, RTNConfig())
    assert torch.equal(quantize(weight, scheme, RTNConfig()).dequantize(), expected.dequantize())
    assert weight.dtype == dtype


@NAMED
@pytest.mark.parametrize("factor", [1e-30, 1e-7, 1e30])
def test_tiny_and_huge_weights_lose_nothing_but_rounding(scheme, factor):
    weight = example((6, 48)) * factor
    error = (quantize(weight, scheme, RTNConfig()).dequantize() - weight).double().norm() / weight.double().norm()
    assert error < 2 * 1.1 / 2**scheme.bits


def test_a_group_of_zeros_does_not_coarsen_its_neighbours():
    scheme = Scheme(bits=4, group_size=16, two_level=True, **DYNAMIC)
    weight = 0.01 * torch.randn(4, 48, generator=torch.Generator().manual_seed(0))
    weight[:, :16] = 0
    found = quantize(weight, scheme, RTNConfig()).dequantize()
    alone = quantize(weight[:, 16:], scheme, RTNConfig()).dequantize()
    assert torch.equal(found, torch.cat([torch.zeros(4, 16), alone], 1))


def test_the_search_is_chosen_by_bits():
    weight = example((8, 64)) ** 3
    for bits, same in ((4, "mse"), (8, "minmax")):
        scheme = Scheme(bits=bits)
        chosen = quantize(weight, scheme, RTNConfig()).dequantize()
        assert torch.equal(chosen, quantize(weight, scheme, RTNConfig(search=same)).dequantize())
    assert not math.isnan(float(chosen.sum()))


def test_an_unknown_search_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="'auto', 'minmax' or 'mse'"):
        build_config(CONFIG, search="max")
