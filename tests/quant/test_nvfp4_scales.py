"""Scales of NVFP4 weights against a slow search over all of them."""

import pytest
import torch

from dacc.core.scheme import Scheme
from dacc.quant.grid import find_grid
from dacc.quant.methods import gptq, rtn
from dacc.quant.nvfp4_scales import nvfp4_scales, tensor_scale
from dacc.runtime.nvfp4 import e4m3_values

NVFP4 = Scheme(format="nvfp4", bits=4, group_size=16)
ALL_CODES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
ALL_SCALES = e4m3_values(torch.arange(1, 127, dtype=torch.uint8))


def rows_of(seed=0, rows=6, features=64):
    """Blocks of very different sizes, one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (3 * torch.rand(rows, features // 16, 1, generator=generator) - 3)
    blocks = torch.randn(rows, features // 16, 16, generator=generator) * sizes
    blocks[1, 2] = 0
    return blocks.flatten(1)


def nearest_to(values, scale):
    """The nearest products of codes and a scale."""
    candidates = ALL_CODES * scale
    return candidates[(values.unsqueeze(-1) - candidates).abs().argmin(-1)]


@pytest.mark.parametrize("size", [1e-20, 0.03, 1.0, 7.7, 1e20])
@pytest.mark.parametrize("seed", range(5))
def test_the_scale_of_a_tensor_is_the_least_in_bfloat16_that_covers_it(size, seed):
    rows = rows_of(seed) * size
    scale = tensor_scale(rows)
    assert scale == scale.bfloat16()
    assert scale * 6 * 448 >= rows.abs().max()
    below = torch.nextafter(scale.bfloat16(), torch.zeros((), dtype=torch.bfloat16))
    assert below.float() * 6 * 448 < rows.abs().max()
    assert torch.isin(nvfp4_scales(rows, search=True)[1], ALL_SCALES).all()


def test_a_weight_of_zeros_stays_zero():
    for search in (False, True):
        packed = rtn.quantize(torch.zeros(4, 32), NVFP4, rtn.RTNConfig(search="mse" if search else "minmax"))
        assert not packed.dequantize().any()
        assert not packed.qweight.any()


def test_the_search_finds_the_best_scale_of_all_126():
    rows = rows_of()
    whole, found = nvfp4_scales(rows, search=True)
    blocks = rows.unflatten(1, (-1, 16))
    for row in range(blocks.shape[0]):
        for block in range(blocks.shape[1]):
            values = blocks[row, block]
            errors = torch.stack([(nearest_to(values, s * whole) - values).square().sum() for s in ALL_SCALES])
            own = (nearest_to(values, found[row, block] * whole) - values).square().sum()
            assert own <= errors.min() * (1 + 1e-5)


def test_without_a_search_the_largest_value_of_a_block_is_a_6():
    rows = rows_of()
    whole, found = nvfp4_scales(rows, search=False)
    largest = rows.unflatten(1, (-1, 16)).abs().amax(-1)
    wanted = largest / 6 / whole
    nearest = ALL_SCALES[(wanted.unsqueeze(-1) - ALL_SCALES).abs().argmin(-1)]
    assert torch.equal(found, nearest)
    searched = nvfp4_scales(rows, search=True)[1]
    assert not torch.equal(searched, found)


@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_the_largest_value_has_the_largest_scale_and_is_not_clipped(search):
    rows = rows_of()
    rows[3, 5] = 1000.0
    packed = rtn.quantize(rows, NVFP4, rtn.RTNConfig(search=search))
    assert abs(float(packed.dequantize()[3, 5]) / 1000 - 1) < 0.01
    assert search == "mse" or int(packed.group_scale[3, 0]) in (125, 126)


@pytest.mark.parametrize("search", [False, True])
def test_formula_codes_are_the_nearest_of_all_sixteen(search):
    rows = rows_of()
    grid = find_grid(rows, NVFP4, search=search)
    packed = grid.pack(grid.nearest(rows), tuple(rows.shape))
    found = packed.dequantize()
    whole, blocks = nvfp4_scales(rows, search=search)
    for row in range(rows.shape[0]):
        for column in range(rows.shape[1]):
            scale = blocks[row, column // 16] * whole
            expected = nearest_to(rows[row, column], scale)
            assert abs(found[row, column] - rows[row, column]) == abs(expected - rows[row, column])
    assert torch.equal(grid.round(rows), found)
    assert packed.scale.shape == (1, 1)


def test_many_rows_are_treated_in_chunks(monkeypatch):
    rows = rows_of(rows=50)
    expected = rtn.quantize(rows, NVFP4, rtn.RTNConfig())
    for module in ("grid", "nvfp4_scales"):
        monkeypatch.setattr(f"dacc.quant.{module}.ROWS_VALUES", 64 * 7)
    found = rtn.quantize(rows, NVFP4, rtn.RTNConfig())
    assert all(torch.equal(found.tensors()[name], tensor) for name, tensor in expected.tensors().items())


def test_gptq_on_independent_inputs_is_the_nearest_code_and_better_on_others():
    rows = rows_of()
    plain = rtn.quantize(rows, NVFP4, rtn.RTNConfig(search="mse"))
    assert torch.equal(gptq.quantize(rows, NVFP4, gptq.GPTQConfig(), torch.eye(64)).qweight, plain.qweight)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(500, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    found = gptq.quantize(rows, NVFP4, gptq.GPTQConfig(), x.T @ x / len(x))
    errors = [float((x @ (weight.dequantize() - rows).T).norm()) for weight in (found, plain)]
    assert errors[0] < 0.9 * errors[1]
