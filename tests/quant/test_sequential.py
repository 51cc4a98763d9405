"""Rounding in turn: the compensated weight against a slow solution in double precision, and what each layer sees."""

import pytest
import torch
from torch import nn

from dacc.core.errors import CalibrationError
from dacc.core.scheme import Scheme
from dacc.quant import sequential
from dacc.quant.grams import input_rows
from dacc.quant.grid import find_grid
from dacc.quant.layerwise import BASELINE
from dacc.quant.methods import gptq, rtn
from dacc.quant.moments import Moments
from dacc.quant.ranges import UNSEEN, find_scales
from dacc.quant.sequential import compensated, error_of, in_16_bits, round_in_turn, shifted_bias
from dacc.runtime.weight import to_rows

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 inside diffusers

W4 = Scheme(bits=4)
W4A8 = Scheme(bits=4, act_bits=8, act_mode="static")
W4A4 = Scheme(bits=4, act_bits=4, act_mode="static")


def example(features=12, samples=400, rows=5):
    """A weight, what enters it, and what entered it in the float network."""
    generator = torch.Generator().manual_seed(features)
    weight = torch.randn(rows, features, generator=generator)
    mixing = torch.randn(features, features, generator=generator)
    intact = torch.randn(samples, features, generator=generator) @ mixing
    return weight, intact + 0.3 * torch.randn(samples, features, generator=generator), intact


def moments_of(x, intact, rows):
    """As they are gathered from a whole sample."""
    lag, apart = intact - x, (intact - x) @ rows.T
    means = {"lost": apart, "power": intact @ rows.T}
    shares = {key: {"layer": float(values.square().sum(1).mean())} for key, values in means.items()}
    return Moments(W4, None, x.T @ x / len(x), lag.T @ x / len(x), x.mean(0), lag.mean(0), **shares)


def test_the_compensated_weight_is_the_least_squares_solution():
    weight, x, intact = example()
    found = moments_of(x, intact, weight)
    expected = torch.linalg.lstsq(x.double(), intact.double() @ weight.double().T).solution.T
    torch.testing.assert_close(
        compensated(weight, found.gram, found.lag, damping=0.0), expected.float(), rtol=1e-3, atol=1e-3
    )
    assert (compensated(weight, found.gram, found.lag) - weight).norm() > 0.01 * weight.norm()


def test_with_a_bias_weight_and_bias_are_the_least_squares_solution_together():
    weight, x, intact = example()
    x, intact = x + 1.5, intact - 0.7
    bias = torch.randn(5, generator=torch.Generator().manual_seed(2))
    found = moments_of(x, intact, weight)
    about = found.about_means(weight, "layer")
    with_ones = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(with_ones, intact.double() @ weight.double().T + bias).solution.T
    solved = compensated(weight, about.gram, about.lag, damping=0.0)
    torch.testing.assert_close(solved, solution[:, :-1].float(), rtol=1e-3, atol=1e-3)
    moved = shifted_bias(bias, weight, solved, found)
    assert moved.dtype == torch.float16
    torch.testing.assert_close(moved.float(), solution[:, -1].float(), rtol=2e-3, atol=5e-3)


def test_a_bias_beyond_float16_is_kept_in_bfloat16():
    assert in_16_bits(torch.tensor([7e4])).dtype == torch.bfloat16
    assert in_16_bits(torch.tensor([6e4])).dtype == torch.float16


def test_inputs_that_are_as_in_the_float_network_change_nothing():
    weight, x, _ = example()
    assert torch.equal(compensated(weight, x.T @ x, torch.zeros(12, 12)), weight)
    assert torch.equal(compensated(weight, -torch.eye(12), torch.eye(12)), weight)  # no gram matrix at all


def test_what_is_computed_in_place_is_the_formula_and_leaves_the_statistics():
    weight, x, intact = example(features=150)
    found = moments_of(x + 1.5, intact, weight)
    before = found.gram.clone(), found.lag.clone()
    damped = found.gram.double() + 0.01 * found.gram.diagonal().double().mean() * torch.eye(150, dtype=torch.float64)
    shift = torch.cholesky_solve((weight.double() @ found.lag.double()).T, torch.linalg.cholesky(damped)).T
    expected = (weight.double() + shift).float()
    torch.testing.assert_close(compensated(weight, found.gram, found.lag), expected, rtol=2e-7, atol=0)
    about = found.about_means(weight, "layer")
    assert torch.equal(about.gram, found.gram - torch.outer(found.mean, found.mean))
    assert torch.equal(about.lag, found.lag - torch.outer(found.drift, found.mean))
    assert all(map(torch.equal, before, (found.gram, found.lag)))


GROWTH = """
import psutil
import torch

from dacc.core.scheme import Scheme
from dacc.evaluate.memory import peak_resident_bytes
from dacc.quant.moments import Moments
from dacc.quant.sequential import compensated


def growth(what, features):
    rows, mean = torch.ones(16, features), torch.ones(features)
    gram = torch.full((features, features), 0.1)
    gram.diagonal().add_(5.0)
    lag = torch.full_like(gram, 1e-3)
    before = psutil.Process().memory_info().rss
    if what == "compensated":
        assert not torch.equal(compensated(rows, gram, lag), rows)
    else:
        Moments(Scheme(bits=4), None, gram, lag, mean, mean, {"0": 1.0}, {}).about_means(rows, "0")
    return (peak_resident_bytes() - before) / (8 * features**2)


for features in (64, 3000):  # at first what the libraries take once
    print(growth("about_means", features), growth("compensated", features))
"""


@pytest.mark.slow
def test_no_more_than_one_matrix_of_float64_or_two_of_float32_is_held(run_python):
    about_means, compensated = map(float, run_python(GROWTH).stdout.split()[-2:])
    assert 0.9 < about_means < 1.5
    assert 0.9 < compensated < 1.5


@pytest.mark.parametrize("biased", [False, True])
def test_the_error_is_that_of_the_outputs(biased):
    weight, x, intact = example()
    x, intact = x + 1.5, intact - 0.7
    found = moments_of(x, intact, weight)
    fitted = found.about_means(weight, "layer") if biased else found
    for bits in (3, 4, 8):
        values = find_grid(weight, Scheme(bits=bits), search=True).round(weight)
        wrong = intact.double() @ weight.double().T - x.double() @ values.double().T
        wrong = wrong - wrong.mean(0) if biased else wrong  # which is what the best bias leaves
        power = (intact.double() @ weight.double().T).square().sum(1).mean()
        expected = float(wrong.square().sum(1).mean() / power)
        assert error_of(weight, values, fitted, "layer") == pytest.approx(expected, rel=1e-3)


# a unit


class Attention(nn.Module):
    """Three layers that read one tensor, and one behind them."""

    def __init__(self):
        super().__init__()
        self.out, self.v, self.k, self.q = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        return self.out(torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2), -1) @ self.v(x))


def attention_block(make_block, scheme, *, noise=0.0, **fields):
    torch.manual_seed(0)
    mixing = torch.randn(16, 16) / 4
    inputs = [torch.randn(2, 30, 16) @ mixing for _ in range(6)]
    entering = [x + noise * torch.randn_like(x) for x in inputs] if noise else None
    names = ("out", "q", "v", "k")
    return make_block(Attention(), inputs, dict.fromkeys(names, scheme), entering=entering, **fields)


def test_layers_that_read_one_tensor_share_its_statistics_and_its_scales(make_block, monkeypatch):
    seen, original = [], sequential.moments_of
    monkeypatch.setattr(
        sequential, "moments_of", lambda block, level, *ways: seen.append(list(level)) or original(block, level, *ways)
    )
    found = round_in_turn(attention_block(make_block, W4A8), "minmax")
    assert list(found) == ["out", "q", "v", "k"]
    assert [sorted(level) for level in seen] == [["k", "q", "v"], ["out"]]
    scales = {name: rounded.treated.acts.scale for name, rounded in found.items()}
    assert torch.equal(scales["q"], scales["k"])
    assert torch.equal(scales["q"], scales["v"])
    assert not torch.equal(scales["q"], scales["out"])


def test_a_unit_is_left_as_it_was(make_block):
    block = attention_block(make_block, W4A8)
    before = {name: layer.weight.clone() for name, layer in block.layers.items()}
    biases = {name: layer.bias.clone() for name, layer in block.layers.items()}
    found = round_in_turn(block, "mse")
    assert all(torch.equal(block.layers[name].weight, weight) for name, weight in before.items())
    assert all(torch.equal(block.layers[name].bias, bias) for name, bias in biases.items())
    assert not any(torch.equal(found[name].treated.bias.float(), bias) for name, bias in biases.items())
    assert block.error() < 1e-6
    for name, rounded in found.items():
        torch.testing.assert_close(rounded.treated.weight.dequantize(), rounded.grid.round(rounded.wanted))
        assert not rounded.treated.weight.dequantize().equal(before[name])


@pytest.mark.parametrize("scheme", [W4, W4A8], ids=lambda scheme: scheme.name)
def test_a_layer_that_sees_constants_is_rounded_to_nearest(scheme, make_block):
    torch.manual_seed(0)
    always = 30 * torch.randn(1, 64)
    block = make_block(nn.Sequential(nn.Linear(64, 8)), [always for _ in range(20)], {"0": scheme})
    found = round_in_turn(block, "mse")["0"]
    expected = rtn.quantize(block.module[0].weight, scheme, BASELINE)
    assert torch.equal(found.treated.weight.qweight, expected.qweight)
    assert found.treated.output_error < 0.01


def test_without_noise_the_first_layer_is_that_of_gptq_about_the_mean(make_block):
    block = attention_block(make_block, W4)
    rows = torch.cat([sighting.entering.args[0].flatten(0, 1) for sighting in block.sightings])
    covariance = rows.T @ rows / len(rows) - torch.outer(rows.mean(0), rows.mean(0))
    expected = gptq.quantize(block.module.q.weight, W4, gptq.GPTQConfig(), covariance)
    assert torch.equal(round_in_turn(block, "mse")["q"].treated.weight.qweight, expected.qweight)


def test_a_later_layer_is_rounded_on_what_the_rounded_ones_before_it_give(make_block):
    block = attention_block(make_block, W4A4)
    alone = block.only([plan for plan in block.plans if plan.name == "out"])
    together, apart = round_in_turn(block, "mse"), round_in_turn(alone, "mse")
    assert not torch.equal(together["out"].treated.weight.qweight, apart["out"].treated.weight.qweight)
    acts = together["out"].treated.acts
    assert not torch.equal(acts.scale, apart["out"].treated.acts.scale)


@pytest.mark.parametrize("scheme", [W4, W4A8, W4A4], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_rank_is_below_rounding_to_nearest(scheme, noise, make_block):
    block = attention_block(make_block, scheme, noise=noise)
    rounded = {name: found.treated for name, found in round_in_turn(block, "mse").items()}
    scales = find_scales(block, "mse")
    errors = {}
    from dataclasses import replace

    from dacc.quant.block import Treated
    from dacc.quant.ranges import quantized_weights, roundings_of

    nearest = {
        name: Treated(rtn.quantize(layer.weight, scheme, BASELINE), scales.get(name))
        for name, layer in block.layers.items()
    }
    for kind, treated in (("nearest", nearest), ("turn", rounded)):
        treated = {name: replace(found) for name, found in treated.items()}
        with quantized_weights(block, treated), block.rounding.instead(roundings_of(block, treated)):
            errors[kind] = block.error()
    assert errors["turn"] < (0.97 if noise else 0.9) * errors["nearest"]


@pytest.mark.parametrize("ratio", [50.0, 1.0])
def test_a_split_is_taken_where_it_helps_and_never_harms(ratio, make_block):
    torch.manual_seed(0)
    sizes = torch.tensor([ratio] * 16 + [1.0] * 16)
    layer, inputs = nn.Sequential(nn.Linear(32, 48)), [torch.randn(20, 32) * sizes for _ in range(4)]
    with torch.no_grad():
        layer[0].weight.div_(sizes)
    scheme = Scheme(bits=4, act_bits=8, act_mode="static", split=16)
    whole = scheme.model_copy(update={"split": None})
    found, plain = (
        round_in_turn(make_block(layer, inputs, {"0": each}), "minmax")["0"].treated for each in (scheme, whole)
    )
    kept = found.weight.scheme
    assert kept in (scheme, whole)
    assert found.acts.scale.shape == (1, kept.parts)
    assert found.output_error <= plain.output_error
    if ratio > 1:
        assert kept == scheme
        assert found.output_error < 0.5 * plain.output_error


def test_convolutions_are_rounded_on_their_patches(make_block, residual_block):
    module, inputs = residual_block()
    block = make_block(module, inputs, {"conv1": W4})
    seen = []
    block.module.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for sighting in block.sightings:
        block.run(sighting)
    rows = torch.cat([input_rows(block.module.conv1, x) for x in seen])
    weight = block.module.conv1.weight
    covariance = rows.T @ rows / len(rows) - torch.outer(rows.mean(0), rows.mean(0))
    expected = gptq.quantize(weight, W4, gptq.GPTQConfig(), covariance)
    found = round_in_turn(block, "mse")["conv1"].treated.weight
    assert float((found.dequantize() != expected.dequantize()).float().mean()) < 0.02  # sums in another order


def test_tables_are_looked_up_and_grouped_convolutions_are_rounded_to_nearest(make_block):
    torch.manual_seed(0)

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.grouped, self.never = nn.Embedding(7, 8), nn.Conv2d(8, 8, 1, groups=2), nn.Linear(4, 4)

        def forward(self, indices):
            return self.grouped(self.table(indices).movedim(-1, 1))

    schemes = {"table": Scheme(bits=8), "grouped": W4, "never": W4A8}
    block = make_block(Odd(), [torch.randint(7, (2, 3, 3))], schemes)
    found = round_in_turn(block, "mse")
    assert found["table"].grid is found["table"].wanted is None
    assert found["table"].treated.method == "rtn"
    for name in ("grouped", "never"):
        rows = to_rows(getattr(block.module, name).weight)
        expected = find_grid(rows, W4, search=True).round(rows)
        torch.testing.assert_close(to_rows(found[name].treated.weight.dequantize()), expected)
    assert found["never"].treated.acts.scale.tolist() == [[2 * UNSEEN / 256]]


@pytest.mark.parametrize("scheme", [W4, W4A8], ids=lambda scheme: scheme.name)
def test_what_is_no_number_is_refused_and_the_weights_come_back(scheme, make_block):
    block = attention_block(make_block, scheme)
    before = {name: layer.weight.clone() for name, layer in block.layers.items()}
    block.sightings[2].entering.args[0][0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="holds NaN or infinity"):
        round_in_turn(block, "mse")
    assert all(torch.equal(block.layers[name].weight, weight) for name, weight in before.items())
