import pytest
import torch

from dacc.core.scheme import Scheme
from dacc.runtime.kernels_weight_only import float_weight
from dacc.runtime.weight import QuantizedWeight, from_rows, integer_rows, scale_columns, state_shapes, to_rows

DYNAMIC = {"act_bits": 8, "act_mode": "dynamic"}
SCHEMES = [
    Scheme(bits=8),
    Scheme(bits=3),
    Scheme(bits=5, symmetric=False),
    Scheme(bits=4, group_size=12, symmetric=False),
    Scheme(bits=2, group_size=9),
    Scheme(bits=4, group_size=12, two_level=True, **DYNAMIC),
    Scheme(bits=8, **DYNAMIC),
]
SPLITS = [
    Scheme(bits=3, split=7),
    Scheme(bits=5, symmetric=False, split=35),
    Scheme(bits=4, group_size=12, symmetric=False, split=24),
    Scheme(bits=4, group_size=6, split=18),
    Scheme(bits=4, group_size=6, two_level=True, split=12, **DYNAMIC),
    Scheme(bits=4, group_size=18, two_level=True, split=18, **DYNAMIC),
    Scheme(bits=8, split=1, **DYNAMIC),
]
SHAPES = [(5, 36), (5, 4, 3, 3), (5, 12, 3), (2, 1, 3, 3, 4)]
CASES = [(scheme, shape) for scheme in SCHEMES for shape in SHAPES]
CASES += [(scheme, shape) for scheme in SPLITS for shape in [(5, 36), (5, 36, 1, 1)]]
EACH_CASE = pytest.mark.parametrize(
    ("scheme", "shape"), CASES, ids=[f"{scheme.name} {len(shape)}d" for scheme, shape in CASES]
)


def random_weight(scheme, shape, dtype=torch.float32):
    """Any codes and scales, and the floats that they mean, computed one by one."""
    generator = torch.Generator().manual_seed(0)
    rows, features = shape[0], torch.Size(shape[1:]).numel()
    groups = features // scheme.group_size if scheme.group_size else scheme.parts
    low, high = scheme.code_range
    codes = torch.randint(low, high + 1, (rows, features), generator=generator)
    scale = torch.rand(rows, scheme.parts if scheme.two_level else groups, generator=generator).to(dtype)
    zero_point = None if scheme.symmetric else torch.randint(0, high + 1, (rows, groups), generator=generator)
    multiplier = torch.randint(1, 16, (rows, groups), generator=generator) if scheme.two_level else None
    weight = QuantizedWeight.from_codes(
        codes, scheme, shape, scale=scale, zero_point=zero_point, group_scale=multiplier
    )
    expected = torch.empty(rows, features)
    for row in range(rows):
        for feature in range(features):
            part = int(scheme.split is not None and feature >= scheme.split)
            group = feature // scheme.group_size if scheme.group_size else part
            integer = codes[row, feature] - (0 if zero_point is None else zero_point[row, group])
            if multiplier is not None:
                integer = integer * multiplier[row, group]
            expected[row, feature] = integer.float() * scale[row, part if scheme.two_level else group].float()
    return weight, channels_first(expected, shape)


def channels_first(rows, shape):
    """Rows that hold one kernel position after the other, each with all its channels, as a weight of `shape`."""
    if len(shape) == 2:
        return rows
    kernel = torch.Size(shape[2:]).numel()
    weight = torch.empty(shape[0], shape[1], kernel)
    for channel in range(shape[1]):
        for position in range(kernel):
            weight[:, channel, position] = rows[:, position * shape[1] + channel]
    return weight.view(shape)


@EACH_CASE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dequantizing_equals_the_formula_number_by_number(scheme, shape, dtype):
    weight, expected = random_weight(scheme, shape, dtype)
    assert torch.equal(weight.dequantize(), expected)
    assert torch.equal(weight.dequantize(torch.bfloat16), expected.bfloat16())


@EACH_CASE
def test_shapes_are_known_before_the_weight_is(scheme, shape):
    tensors = random_weight(scheme, shape)[0].tensors()
    shapes = state_shapes(scheme, shape)
    assert tensors.keys() == shapes.keys()
    for name, (expected, dtype) in shapes.items():
        assert tuple(tensors[name].shape) == expected
        assert dtype in (None, tensors[name].dtype)


def test_two_level_weights_are_exact_int8_values():
    scheme = Scheme(bits=4, group_size=4, two_level=True, **DYNAMIC)
    codes = torch.tensor([[-8, 7, 0, 1, -8, 7, -1, 3]])
    weight = QuantizedWeight.from_codes(
        codes, scheme, (1, 8), scale=torch.ones(1, 1), group_scale=torch.tensor([[15, 1]])
    )
    integers = integer_rows(weight.qweight, weight.group_scale, scheme, 8)
    assert integers.dtype == torch.int8
    assert integers.tolist() == [[-120, 105, 0, 15, -8, 7, -1, 3]]


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_become_the_weight_again(shape):
    weight = torch.randn(shape)
    assert to_rows(weight).shape == (shape[0], weight[0].numel())
    assert torch.equal(from_rows(to_rows(weight), shape), weight)
    assert torch.equal(channels_first(to_rows(weight), shape), weight)


@EACH_CASE
def test_the_fast_form_unpacks_the_same_weight(scheme, shape):
    weight, expected = random_weight(scheme, shape)
    torch.testing.assert_close(float_weight(torch.empty(0), weight), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES + SPLITS if scheme.symmetric], ids=lambda s: s.name)
def test_scale_columns_are_what_one_step_of_a_code_is_worth(scheme):
    weight, expected = random_weight(scheme, (5, 36))
    codes = integer_rows(weight.qweight, None, scheme, 36)
    columns = scale_columns(weight.scale, weight.group_scale, scheme, 36)
    torch.testing.assert_close(columns * codes, expected)
