import pytest
import torch

from dacc.core.scheme import Scheme
from dacc.runtime.activation import ActivationScale, activation_shapes, quantize_static, round_static


def point(value):
    return torch.tensor(value, dtype=torch.uint8)


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
def test_integers_equal_the_formula_number_by_number(bits):
    x = torch.randn(200, generator=torch.Generator().manual_seed(0)) * 3
    top = 2**bits - 1
    for zero_point in (0, 3, top):
        scale = torch.tensor(0.07)
        expected = [min(max(round(float(value * (1 / scale))) + zero_point, 0), top) - 2 ** (bits - 1) for value in x]
        assert quantize_static(x, scale, point(zero_point), bits).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_keeps_the_dtype_and_moves_no_value_inside_the_range_by_more_than_half_a_step(dtype):
    scale, zero_point = torch.tensor(0.125), point(100)
    x = torch.linspace(-12.5, 19.375, 500).to(dtype)
    rounded = round_static(x, scale, zero_point, 8)
    assert rounded.dtype == dtype
    assert (rounded.float() - x.float()).abs().max() <= 0.0625
    assert torch.equal(round_static(rounded, scale, zero_point, 8), rounded)


def test_values_outside_the_range_and_infinities_are_clipped():
    x = torch.tensor([float("-inf"), -1e30, 0.0, 1e30, float("inf")])
    assert quantize_static(x, torch.tensor(1e-3), point(0), 8).tolist() == [-128, -128, -128, 127, 127]
    assert round_static(x, torch.tensor(0.5), point(255), 8).tolist() == [-127.5, -127.5, 0, 0, 0]


@pytest.mark.parametrize(
    ("scheme", "shape"),
    [
        (Scheme(bits=8), None),
        (Scheme(bits=8, act_bits=8, act_mode="dynamic", split=3), None),
        (Scheme(bits=8, act_bits=8, act_mode="static"), (1, 1)),
        (Scheme(bits=8, act_bits=8, act_mode="static", split=3), (1, 2)),
        (Scheme(bits=8, act_bits=8, act_mode="per-step", act_steps=50, split=3), (51, 2)),
    ],
)
def test_shapes_are_known_from_the_scheme(scheme, shape):
    shapes = activation_shapes(scheme)
    if shape is None:
        assert not shapes
        return
    assert shapes == {"act_scale": (shape, torch.float32), "act_zero_point": (shape, torch.uint8)}
    stored = ActivationScale(torch.ones(shape), torch.zeros(shape, dtype=torch.uint8)).tensors()
    assert stored.keys() == shapes.keys()
