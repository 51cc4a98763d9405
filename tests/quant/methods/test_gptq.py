import pytest
import torch
from torch import nn

from dacc.core.config import build_config
from dacc.core.errors import CalibrationError, ConfigError
from dacc.core.journal import Journal
from dacc.core.scheme import Scheme
from dacc.quant.grams import Grams
from dacc.quant.grid import find_grid
from dacc.quant.methods import rtn
from dacc.quant.methods.gptq import CONFIG, GPTQConfig, quantize, round_columns
from dacc.runtime.packing import pack_codes, unpack_codes
from dacc.runtime.weight import QuantizedWeight, to_rows

DYNAMIC = {"act_bits": 8, "act_mode": "dynamic"}
SCHEMES = [
    Scheme(bits=3),
    Scheme(bits=4),
    Scheme(bits=8),
    Scheme(bits=3, group_size=16, symmetric=False),
    Scheme(bits=4, group_size=16, symmetric=False),
    Scheme(bits=8, group_size=16, symmetric=False),
    Scheme(bits=4, group_size=16, two_level=True, **DYNAMIC),
]
NAMED = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
ORDERED = pytest.mark.parametrize("act_order", [False, True], ids=["natural", "act_order"])


def example(rows=6, features=48, samples=400):
    """A weight, inputs whose features are correlated and of different sizes, and their gram matrix."""
    generator = torch.Generator().manual_seed(features)
    weight = torch.randn(rows, features, generator=generator)
    mixing = torch.randn(features, features // 4, generator=generator)
    x = torch.randn(samples, features // 4, generator=generator) @ mixing.T
    x = (x + torch.randn(samples, features, generator=generator)) * torch.rand(features, generator=generator)
    return weight, x, gram_of(x)


def gram_of(x):
    return x.T @ x / len(x)


def codes_of(found):
    features = torch.Size(found.shape[1:]).numel()
    return unpack_codes(found.qweight, found.scheme.bits, features, signed=found.scheme.symmetric).float()


def output_error(weight, quantized, x):
    """||(W - W^) x||, input by input."""
    difference = to_rows(weight) - to_rows(quantized.dequantize())
    return sum(float((difference @ column).square().sum()) for column in x) ** 0.5


def brain_surgeon(rows, gram, grid, config):
    """Round a column, then move all that are still float as Optimal Brain Surgeon says; the Hessian of these columns is
    inverted anew each time."""
    features = rows.shape[1]
    hessian = gram.double() + config.damping * gram.diagonal().double().mean() * torch.eye(features)
    order = sorted(range(features), key=lambda column: -gram[column, column] if config.act_order else column)
    scale, zero = (values.double() for values in grid.columns(features))
    rows, codes = rows.double(), torch.empty(rows.shape)
    for place, column in enumerate(order):
        still = order[place:]
        inverse = torch.linalg.inv(hessian[still][:, still])
        code = (rows[:, column] / scale[:, column]).round() + zero[:, column]
        codes[:, column] = code = code.clamp(*grid.scheme.code_range)
        error = rows[:, column] - scale[:, column] * (code - zero[:, column])
        rows[:, still] -= error[:, None] * inverse[0] / inverse[0, 0]
    return codes


@NAMED
@ORDERED
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_formula_equals_optimal_brain_surgery_column_by_column(scheme, act_order, damping):
    weight, _, gram = example()
    config, grid = GPTQConfig(damping=damping, act_order=act_order), find_grid(weight, scheme, search=True)
    found = quantize(weight, scheme, config, gram)
    assert torch.equal(codes_of(found), brain_surgeon(weight, gram, grid, config))
    assert not torch.equal(codes_of(found), grid.nearest(weight).float())
    nearest = rtn.quantize(weight, scheme, rtn.RTNConfig(search="mse"))
    assert torch.equal(found.scale, nearest.scale)


@ORDERED
@pytest.mark.parametrize("features", [128, 144, 272])
def test_formula_holds_across_the_blocks_of_columns(features, act_order):
    weight, _, gram = example(rows=3, features=features)
    for scheme in (Scheme(bits=4), Scheme(bits=3, group_size=16, symmetric=False)):
        config, grid = GPTQConfig(act_order=act_order), find_grid(weight, scheme, search=True)
        codes, wanted = round_columns(weight, gram, grid, config)
        assert torch.equal(codes, brain_surgeon(weight, gram, grid, config))
        assert torch.equal(grid.nearest(wanted).float(), codes)


@NAMED
@pytest.mark.parametrize("columns", [1, 7, 1000])
def test_the_size_of_a_block_changes_no_code(scheme, columns, monkeypatch):
    weight, _, gram = example(rows=3, features=304)
    expected = codes_of(quantize(weight, scheme, GPTQConfig(), gram))
    monkeypatch.setattr("dacc.quant.methods.gptq.BLOCK_COLUMNS", columns)
    assert torch.equal(codes_of(quantize(weight, scheme, GPTQConfig(), gram)), expected)


@NAMED
@ORDERED
def test_rank_is_below_rounding_to_nearest_on_correlated_inputs(scheme, act_order):
    weight, x, _ = example(rows=16, features=96, samples=1000)
    fitted, held_out = x.split(500)
    nearest = rtn.quantize(weight, scheme, rtn.RTNConfig(search="mse"))
    found = quantize(weight, scheme, GPTQConfig(act_order=act_order), gram_of(fitted))
    assert output_error(weight, found, fitted) < 0.75 * output_error(weight, nearest, fitted)
    assert output_error(weight, found, held_out) < 0.85 * output_error(weight, nearest, held_out)


@NAMED
def test_round_trip_through_the_journal_is_bit_for_bit(scheme, tmp_path):
    weight, _, gram = example(features=80)
    found = quantize(weight, scheme, GPTQConfig(), gram)
    assert torch.equal(pack_codes(codes_of(found), scheme.bits), found.qweight)
    journal = Journal(tmp_path / "units", "key")
    journal.open(resume=True)
    journal.save("layer", found.tensors(), {})
    resumed = Journal(tmp_path / "units", "key")
    resumed.open(resume=True)
    tensors = {name: tensor.load() for name, tensor in resumed.tensors("layer").items()}
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        name: tensor.dtype for name, tensor in found.tensors().items()
    }
    assert torch.equal(QuantizedWeight(scheme, found.shape, **tensors).dequantize(), found.dequantize())
    scale, zero = find_grid(weight, scheme, search=True).columns(80)
    torch.testing.assert_close(found.dequantize(), (codes_of(found) - zero) * scale, rtol=1e-6, atol=0)


@NAMED
@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
def test_repeat_gives_the_same_bytes_however_rows_are_dealt(scheme, chunk, monkeypatch):
    weight, _, gram = example()
    before = weight.clone(), gram.clone()
    first = quantize(weight, scheme, GPTQConfig(), gram).tensors()
    monkeypatch.setattr("dacc.quant.grid.ROWS_VALUES", chunk)
    for name, value in quantize(weight, scheme, GPTQConfig(), gram).tensors().items():
        assert torch.equal(value, first[name])
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])


# grams of all kinds


@NAMED
@ORDERED
@pytest.mark.parametrize("power", [1e-6, 1.0, 1e6])
def test_white_inputs_give_the_nearest_codes(scheme, act_order, power):
    weight, _, _ = example(features=144)
    found = quantize(weight, scheme, GPTQConfig(act_order=act_order), power * torch.eye(144))
    expected = rtn.quantize(weight, scheme, rtn.RTNConfig(search="mse"))
    assert all(torch.equal(value, expected.tensors()[name]) for name, value in found.tensors().items())


@NAMED
@pytest.mark.parametrize("samples", [1, 5, 47])
def test_fewer_samples_than_features_are_enough(scheme, samples):
    weight, x, _ = example()
    nearest = rtn.quantize(weight, scheme, rtn.RTNConfig(search="mse"))
    found = quantize(weight, scheme, GPTQConfig(), gram_of(x[:samples]))
    assert output_error(weight, found, x[:samples]) < 0.5 * output_error(weight, nearest, x[:samples])


def test_damping_grows_until_a_singular_gram_can_be_inverted():
    weight, x, _ = example()
    gram = gram_of(x[:3].half().float()) - 1e-3 * torch.eye(48)  # not even positive
    assert quantize(weight, Scheme(bits=4), GPTQConfig(damping=1e-12), gram).dequantize().isfinite().all()


def test_a_gram_that_is_noise_below_zero_is_damped():
    weight, _, gram = example()
    found = quantize(weight, Scheme(bits=4), GPTQConfig(), -1e-6 * gram)
    assert found.dequantize().isfinite().all()


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_gram_that_means_nothing_is_refused(value):
    weight, _, gram = example()
    with pytest.raises(CalibrationError, match="cannot be inverted") as caught:
        quantize(weight, Scheme(bits=4), GPTQConfig(), gram * float(value))
    assert "calibrate with others" in caught.value.mend


@NAMED
@ORDERED
def test_inputs_that_are_all_zero_give_the_nearest_codes(scheme, act_order):
    weight, _, gram = example()
    found = quantize(weight, scheme, GPTQConfig(act_order=act_order), torch.zeros_like(gram))
    expected = rtn.quantize(weight, scheme, rtn.RTNConfig(search="mse"))
    assert torch.equal(found.dequantize(), expected.dequantize())


@ORDERED
@pytest.mark.parametrize("power", [1e-4, 1.0, 1e4])
def test_silent_features_are_rounded_to_nearest_and_change_no_other(act_order, power):
    weight, _, gram = example()
    gram, config = power * gram, GPTQConfig(act_order=act_order)
    speaking = torch.arange(48) % 3 != 1
    grid = find_grid(weight, Scheme(bits=4), search=True)
    muted = gram * speaking * speaking[:, None]
    found, wanted = round_columns(weight, muted, grid, config)
    assert torch.equal(found[:, ~speaking], grid.nearest(weight)[:, ~speaking].float())
    assert torch.equal(wanted[:, ~speaking], weight[:, ~speaking])
    alone, _ = round_columns(weight[:, speaking], gram[speaking][:, speaking], grid, config)
    assert torch.equal(found[:, speaking], alone)


@pytest.mark.parametrize("power", [1e-8, 1e8])
@NAMED
def test_the_size_of_all_inputs_does_not_matter(scheme, power):
    weight, _, gram = example()
    expected = quantize(weight, scheme, GPTQConfig(), gram)
    assert torch.equal(quantize(weight, scheme, GPTQConfig(), power * gram).qweight, expected.qweight)


@pytest.mark.parametrize("act_order", [False, True])
def test_much_damping_is_rounding_to_nearest(act_order):
    weight, _, gram = example()
    found = quantize(weight, Scheme(bits=4), GPTQConfig(damping=1e9, act_order=act_order), gram)
    assert torch.equal(found.qweight, rtn.quantize(weight, Scheme(bits=4), rtn.RTNConfig(search="mse")).qweight)


# convolutions and other weights


@NAMED
@pytest.mark.parametrize(
    "geometry",
    [
        {"padding": 1},
        {"stride": 2},
        {"dilation": 2, "padding": (2, 1)},
        {"padding": "same"},
        {"padding": 1, "padding_mode": "circular", "stride": 2},
    ],
    ids=str,
)
@torch.no_grad()
def test_a_convolution_makes_less_error_in_what_it_gives(scheme, geometry):
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 6, 3, **geometry)
    images = torch.randn(3, 1, 12, 12) + 0.5 * torch.randn(3, 16, 12, 12) * torch.rand(16, 1, 1)
    with Grams({"layer": layer}, rows_per_call=10**6) as grams:
        expected = layer(images)
    weight, errors = layer.weight.clone(), {}
    for name, quantized in {
        "rtn": rtn.quantize(weight, scheme, rtn.RTNConfig(search="mse")),
        "gptq": quantize(weight, scheme, GPTQConfig(), grams.mean("layer")),
    }.items():
        assert quantized.shape == (6, 16, 3, 3)
        layer.weight.copy_(quantized.dequantize())
        errors[name] = float((layer(images) - expected).norm())
    assert errors["gptq"] < 0.8 * errors["rtn"]


@NAMED
def test_the_rows_of_a_convolution_are_those_of_a_matrix(scheme):
    weight, _, gram = example(rows=5, features=144)
    kernel = weight.view(5, 3, 3, 16).movedim(-1, 1)
    found = quantize(kernel, scheme, GPTQConfig(), gram)
    assert torch.equal(found.qweight, quantize(weight, scheme, GPTQConfig(), gram).qweight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type_is_taken_as_it_is(dtype):
    weight, _, gram = example()
    weight = weight.to(dtype)
    expected = quantize(weight.float(), Scheme(bits=4), GPTQConfig(), gram)
    assert torch.equal(quantize(weight, Scheme(bits=4), GPTQConfig(), gram).dequantize(), expected.dequantize())
    assert weight.dtype == dtype


def test_one_feature_has_nothing_to_spread():
    weight = torch.tensor([[0.3], [-0.7]])
    found = quantize(weight, Scheme(bits=4), GPTQConfig(), torch.ones(1, 1))
    torch.testing.assert_close(found.dequantize(), weight, rtol=2**-11, atol=0)  # scales are float16


@pytest.mark.parametrize("damping", [0, -1, "inf", "nan"])
def test_damping_that_is_not_a_positive_share_is_refused(damping):
    with pytest.raises(ConfigError, match="damping"):
        build_config(CONFIG, damping=damping)
