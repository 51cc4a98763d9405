import pytest
import torch
from torch import nn

from dacc.core.scheme import Scheme
from dacc.quant.methods import rtn
from dacc.quant.smoothing import smoothings
from dacc.quant.take_apart import Layer, error_of, take_apart
from dacc.runtime.layers import QuantizedLinear

DYNAMIC = {"act_mode": "dynamic"}
SCHEMES = [
    Scheme(bits=4, group_size=16, symmetric=False),
    Scheme(format="nvfp4", bits=4, group_size=16),
    Scheme(bits=8, act_bits=8, **DYNAMIC),
    Scheme(bits=4, group_size=16, two_level=True, act_bits=4, **DYNAMIC),
    Scheme(bits=4, group_size=16, act_bits=4, act_mode="per-group", act_group_size=16),
]
NAMED = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)


def example(scheme=SCHEMES[0]):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(20, 48, generator=generator), torch.randn(70, 48, generator=generator)
    x[:, 5] *= 30
    layer = Layer.reading(x, weight, scheme.model_copy(update={"rank": 3, "smooth": True}))
    return layer, smoothings(x.abs().amax(0), [weight], 4)[-1]


@NAMED
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("smooth", [False, True])
@torch.no_grad()
def test_the_error_is_that_of_the_layer_that_runs(scheme, rank, smooth):
    layer, smoothing = example(scheme)
    assert layer.scheme == scheme
    parts = take_apart(layer, smoothing if smooth else None, rank, 0)
    packed = parts.pack(parts.grid.nearest(parts.residual))
    assert packed.scheme == scheme.model_copy(update={"rank": rank or None, "smooth": smooth})
    running = QuantizedLinear(nn.Linear(48, 20, bias=False), packed.scheme)
    running.store_weight(packed)
    wrong = float((running(layer.inputs) - layer.outputs).norm() / layer.outputs.norm())
    assert error_of(layer, parts) ** 0.5 == pytest.approx(wrong, rel=1e-3)
    torch.testing.assert_close(packed.residual(), parts.rounded)


@pytest.mark.parametrize("scheme", SCHEMES[3:], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("rank", [0, 5])
@torch.no_grad()
def test_the_error_with_a_shift_is_that_of_the_layer_that_runs(scheme, rank):
    layer, smoothing = example(scheme)
    moved = layer.shifted(0.5)
    assert layer.shift is None
    parts = take_apart(moved, smoothing, rank, 0)
    packed = parts.pack(parts.grid.nearest(parts.residual))
    assert packed.scheme.shifted
    assert packed.act_shift.tolist() == [0.5]
    running = QuantizedLinear(nn.Linear(48, 20, bias=False), packed.scheme)
    running.store_weight(packed)
    wrong = float((running(layer.inputs) - layer.outputs).norm() / layer.outputs.norm())
    assert error_of(moved, parts) ** 0.5 == pytest.approx(wrong, rel=1e-3)


@NAMED
def test_the_parts_make_the_weight(scheme):
    layer, smoothing = example(scheme)
    parts = take_apart(layer, smoothing, 5, 0)
    whole = (parts.up.float() @ parts.down.float() + parts.residual) / smoothing.float()
    torch.testing.assert_close(whole, layer.rows, rtol=1e-4, atol=1e-5)
    values = torch.linalg.svdvals(layer.rows * smoothing.float())
    assert float(parts.residual.norm()) == pytest.approx(float(values[5:].square().sum().sqrt()), rel=2e-3)


@NAMED
def test_without_smoothing_and_branch_it_is_rounding_to_nearest_bit_for_bit(scheme):
    layer, _ = example(scheme)
    parts = take_apart(layer, None, 0, 0)
    found = parts.pack(parts.grid.nearest(parts.residual)).tensors()
    expected = rtn.quantize(layer.rows, scheme, rtn.RTNConfig(search="mse")).tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_branch_leaves_what_the_rounded_residual_stands_for():
    layer, smoothing = example()
    first = take_apart(layer, smoothing, 5, 0)
    second = take_apart(layer, smoothing, 5, 0, given=first.rounded)
    wanted = layer.rows * smoothing.float() - first.rounded
    best = torch.linalg.svdvals(wanted)[5:].square().sum().sqrt()
    assert float((wanted - second.up.float() @ second.down.float()).norm()) <= 1.01 * float(best)


def test_full_rank_leaves_nothing_but_the_precision_of_its_factors():
    layer, smoothing = example(Scheme(bits=2))
    parts = take_apart(layer, smoothing, 100, 0)
    assert parts.down.shape == (20, 48)
    assert error_of(layer, parts) ** 0.5 < 1e-3


def test_other_codes_are_other_values():
    layer, _ = example()
    parts = take_apart(layer, None, 0, 0)
    codes = parts.grid.nearest(parts.residual)
    torch.testing.assert_close(parts.with_codes(codes).rounded, parts.rounded)
    assert (
        error_of(layer, parts.with_codes(codes.flip(0))) > error_of(layer, parts) > error_of(layer, parts.unrounded())
    )
