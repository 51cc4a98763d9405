"""Rounding in turn: the compensated weight against a slow solution in double precision, and what each layer sees."""

import pytest
import torch
from torch import nn

from dacc.core.errors import CalibrationError
from dacc.core.scheme import Scheme
from dacc.quant.grams import input_rows
from dacc.quant.grid import find_grid
from dacc.quant.layerwise import BASELINE
from dacc.quant.methods import gptq, rtn
from dacc.quant.ranges import UNSEEN, find_scales
from dacc.quant.sequential import CALLS, Moments, compensated, error_of, noise_of, round_in_turn, some_sightings
from dacc.runtime.activation import ActivationScale
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


def moments_of(x, intact):
    return Moments(x.T @ x / len(x), (intact - x).T @ x / len(x), [[]])


def test_the_compensated_weight_is_the_least_squares_solution():
    weight, x, intact = example()
    found = moments_of(x, intact)
    expected = torch.linalg.lstsq(x.double(), intact.double() @ weight.double().T).solution.T
    torch.testing.assert_close(
        compensated(weight, found.gram, found.lag, damping=0.0), expected.float(), rtol=1e-3, atol=1e-3
    )
    assert (compensated(weight, found.gram, found.lag) - weight).norm() > 0.01 * weight.norm()


def test_noise_on_the_inputs_shrinks_the_weight_as_least_squares_do():
    weight, x, intact = example()
    noise = torch.rand(12, generator=torch.Generator().manual_seed(1))
    found = moments_of(x, intact)
    # a sample of x with noise of variance v has the gram matrix of x above that of rows sqrt(N v_j) e_j
    below = torch.diag((len(x) * noise.double()).sqrt())
    inputs = torch.cat([x.double(), below])
    targets = torch.cat([intact.double() @ weight.double().T, torch.zeros(12, 5, dtype=torch.float64)])
    expected = torch.linalg.lstsq(inputs, targets).solution.T
    gram = found.gram + torch.diag(noise)
    solved = compensated(weight, gram, found.lag - torch.diag(noise), damping=0.0)
    torch.testing.assert_close(solved, expected.float(), rtol=1e-3, atol=1e-3)


def test_inputs_that_are_as_in_the_float_network_change_nothing():
    weight, x, _ = example()
    assert torch.equal(compensated(weight, x.T @ x, torch.zeros(12, 12)), weight)
    assert torch.equal(compensated(weight, -torch.eye(12), torch.eye(12)), weight)  # no gram matrix at all


def test_the_error_is_that_of_the_outputs_up_to_what_no_weight_can_change():
    weight, x, intact = example()
    noise = torch.rand(12, generator=torch.Generator().manual_seed(1))
    found = moments_of(x, intact)

    def slow(values):
        wrong = (intact.double() @ weight.double().T - x.double() @ values.double().T).square().sum(1).mean()
        return float(wrong + (values.double().square() * noise.double()).sum())

    power = float((x.double() @ weight.double().T).square().sum(1).mean())
    rounded = [find_grid(weight, Scheme(bits=bits), search=True).round(weight) for bits in (3, 4, 8)]
    constant = slow(weight) - power * error_of(weight, weight, found, noise)
    for values in rounded:
        assert power * error_of(weight, values, found, noise) + constant == pytest.approx(slow(values), rel=1e-3)


@pytest.mark.parametrize("split", [None, 5])
def test_the_noise_of_fixed_scales_is_a_twelfth_of_the_square_of_a_step(split):
    scheme = Scheme(bits=4, act_bits=8, act_mode="static", split=split)
    scale = torch.tensor([[0.3, 0.7]])[:, : scheme.parts]
    found = noise_of(scheme, ActivationScale(scale, torch.zeros_like(scale)), torch.eye(12))
    expected = [0.3**2 / 12] * (split or 12) + [0.7**2 / 12] * (12 - (split or 12))
    torch.testing.assert_close(found, torch.tensor(expected))


def test_the_noise_of_a_table_is_the_mean_over_its_calls():
    scheme = Scheme(bits=4, act_bits=8, act_mode="per-step", act_steps=2)
    acts = ActivationScale(torch.tensor([[0.1], [0.5], [9.0]]), torch.zeros(3, 1))
    found = noise_of(scheme, acts, torch.eye(6))
    torch.testing.assert_close(found, torch.full((6,), (0.01 + 0.25) / 2 / 12))


def test_float_activations_bring_no_noise_and_dynamic_ones_about_what_they_do():
    x = torch.randn(2000, 32, generator=torch.Generator().manual_seed(0))
    gram = x.T @ x / len(x)
    assert not noise_of(W4, None, gram).any()
    dynamic = noise_of(Scheme(bits=4, act_bits=8, act_mode="dynamic"), None, gram)
    step = x.abs().amax(1) / 127
    assert 0.3 < float(dynamic.mean() / (step.square() / 12).mean()) < 6


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
    seen = []
    moments = "dacc.quant.sequential._moments"
    from dacc.quant import sequential

    original = sequential._moments
    monkeypatch.setattr(moments, lambda block, level: seen.append(list(level)) or original(block, level))
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
    found = round_in_turn(block, "mse")
    assert all(torch.equal(block.layers[name].weight, weight) for name, weight in before.items())
    assert block.error() < 1e-6
    for name, rounded in found.items():
        torch.testing.assert_close(rounded.treated.weight.dequantize(), rounded.grid.round(rounded.wanted))
        assert not rounded.treated.weight.dequantize().equal(before[name])


def test_without_noise_the_first_layer_is_that_of_gptq(make_block):
    block = attention_block(make_block, W4)
    rows = torch.cat([sighting.entering.args[0].flatten(0, 1) for sighting in block.sightings])
    expected = gptq.quantize(block.module.q.weight, W4, gptq.GPTQConfig(), rows.T @ rows / len(rows))
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
    expected = gptq.quantize(weight, W4, gptq.GPTQConfig(), rows.T @ rows / len(rows))
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


def test_of_many_calls_some_are_taken_always_the_same():
    calls = list(range(1000))
    found = some_sightings(calls)
    assert len(found) == CALLS
    assert found == some_sightings(calls) == sorted(set(found))
    assert min(found) < 50
    assert max(found) > 950
    assert some_sightings(calls[:CALLS]) == calls[:CALLS]
