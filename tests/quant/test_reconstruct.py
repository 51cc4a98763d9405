"""Learned rounding: where it starts, what it may reach, and that it is never worse than its start."""

import math

import pytest
import torch
from torch import nn

from dacc.core.config import build_config
from dacc.core.errors import ConfigError
from dacc.core.reporter import Reporter
from dacc.core.scheme import Scheme
from dacc.quant.block import Block
from dacc.quant.grid import find_grid
from dacc.quant.plan import LayerPlan
from dacc.quant.ranges import UNSEEN
from dacc.quant.reconstruct import (
    LADDER,
    ReconstructionConfig,
    SoftRounding,
    Start,
    _Learner,
    beta_at,
    choose_iterations,
    reconstruct,
    reconstruct_weights,
    relative_error,
)
from dacc.quant.units import Unit
from dacc.quant.walk import UnitInput
from dacc.runtime.trajectory import DenoiserCall
from dacc.runtime.weight import to_rows

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 inside diffusers

W4 = Scheme(bits=4)
FORMATS = [
    W4,
    Scheme(bits=3, group_size=16, symmetric=False),
    Scheme(bits=4, group_size=16, two_level=True, act_bits=8, act_mode="static"),
    Scheme(bits=4, split=32),
    Scheme(bits=2),
]
NAMED = pytest.mark.parametrize("scheme", FORMATS, ids=lambda scheme: scheme.name)
FAST = ReconstructionConfig(iterations=60, learning_rate=3e-2)


def example(scheme, features=48):
    weight = torch.randn(6, features, generator=torch.Generator().manual_seed(0))
    return weight, find_grid(weight, scheme, search=True)


@NAMED
def test_soft_weights_start_at_the_float_ones(scheme):
    weight, _ = example(scheme)
    grid = find_grid(weight, scheme, search=False)
    scale, zero = grid.columns(48)
    codes = weight / scale + zero
    inside = (codes >= scheme.code_range[0]) & (codes <= scheme.code_range[1])
    share = weight / scale - (weight / scale).floor()
    inside &= (share > 1e-3) & (share < 1 - 1e-3)
    assert inside.float().mean() > 0.8
    found = SoftRounding(weight, grid)()
    assert ((found - weight)[inside].abs() / scale[inside]).max() < 1e-5


@NAMED
def test_hard_weights_are_one_of_the_two_neighbours_whatever_was_learned(scheme):
    weight, grid = example(scheme)
    rounding = SoftRounding(weight, grid)
    scale, zero = grid.columns(48)
    floor = (weight / scale).floor() + zero
    with torch.no_grad():
        rounding.alpha.normal_(generator=torch.Generator().manual_seed(1))
    codes = rounding.codes()
    above = floor + (rounding.alpha >= 0)
    assert torch.equal(codes.float(), above.clamp(*scheme.code_range))
    torch.testing.assert_close(rounding.hard(), (codes - zero) * scale)


@NAMED
def test_at_first_the_hard_weights_are_the_nearest(scheme):
    weight, grid = example(scheme)
    assert torch.equal(SoftRounding(weight, grid).codes(), grid.nearest(weight))


def test_the_share_of_the_upper_neighbour_is_a_stretched_sigmoid():
    weight, grid = example(W4)
    rounding = SoftRounding(weight, grid)
    for value in (-10.0, -0.3, 0.0, 0.7, 10.0):
        with torch.no_grad():
            rounding.alpha.fill_(value)
        expected = min(max(1.2 / (1 + math.exp(-value)) - 0.1, 0.0), 1.0)
        torch.testing.assert_close(rounding.share(), torch.full_like(weight, expected))
        penalty = 1 - abs(2 * expected - 1) ** 3.0
        assert rounding.penalty(3.0).item() == pytest.approx(penalty, abs=1e-6)


def test_beta_is_20_after_the_warm_up_and_falls_evenly_to_2():
    found = [beta_at(progress, 0.2) for progress in (0.0, 0.1, 0.1999)]
    assert found == [None, None, None]
    assert beta_at(0.2, 0.2) == 20
    assert beta_at(0.6, 0.2) == pytest.approx(11)
    assert beta_at(1.0, 0.2) == pytest.approx(2)
    assert beta_at(0.0, 0.0) == 20


def test_codes_have_decided_in_the_end_and_would_not_without_the_penalty(make_block, residual_block):
    undecided = {}
    for regularization in (3.0, 0.0):
        block, starts = unet_block(make_block, residual_block)
        learner = _Learner(block, starts, ReconstructionConfig(regularization=regularization, learning_rate=3e-2))
        for number in range(600):
            learner.update(number / 600)
        shares = torch.cat([rounding.share().flatten() for rounding in learner.soft.values()])
        undecided[regularization] = ((shares > 0.01) & (shares < 0.99)).float().mean().item()
    assert undecided[3.0] < 0.03
    assert undecided[0.0] > 0.3


def test_the_penalty_is_off_in_the_warm_up(make_block, residual_block, monkeypatch):
    betas = []
    penalty = SoftRounding.penalty

    def watch(self, beta):
        betas.append(beta)
        return penalty(self, beta)

    monkeypatch.setattr(SoftRounding, "penalty", watch)
    block, starts = unet_block(make_block, residual_block)
    reconstruct(block, starts, ReconstructionConfig(warm_up=0.4), 10)
    assert betas == pytest.approx([20 - 18 * number / 6 for number in range(6) for _ in starts])


# a unit


def unet_block(make_block, residual_block, scheme=W4):
    """A residual block, its layers to be rounded to nearest."""
    module, inputs = residual_block()
    schemes = dict.fromkeys(("conv1", "conv2", "time_emb_proj"), scheme) | {
        "conv_shortcut": scheme.model_copy(update={"split": 12})
    }
    block = make_block(module, inputs, schemes)
    rows = {name: to_rows(layer.weight) for name, layer in block.layers.items()}
    starts = {name: Start(find_grid(values, schemes[name], search=True), values) for name, values in rows.items()}
    return block, starts


def values_of(codes, starts):
    found = {}
    for name, start in starts.items():
        scale, zero = start.grid.columns(start.rows.shape[1])
        found[name] = (codes[name] - zero) * scale
    return found


def test_a_reconstructed_block_is_better_than_the_nearest_codes_at_the_same_scales(make_block, residual_block):
    block, starts = unet_block(make_block, residual_block)
    nearest = {name: start.grid.nearest(start.rows) for name, start in starts.items()}
    found = reconstruct(block, starts, FAST, 200)
    assert block.error(values_of(found, starts)) < 0.9 * block.error(values_of(nearest, starts))
    for name, start in starts.items():
        scale, zero = start.grid.columns(start.rows.shape[1])
        floor = (start.rows / scale).floor() + zero
        low, high = start.grid.scheme.code_range
        assert ((found[name] == floor.clamp(low, high)) | (found[name] == (floor + 1).clamp(low, high))).all()
    assert any(not torch.equal(found[name], nearest[name].to(torch.int16)) for name in starts)


@pytest.mark.parametrize("iterations", [0, 1, 30])
def test_a_block_is_never_worse_than_its_start(iterations, make_block, residual_block):
    block, starts = unet_block(make_block, residual_block)
    nearest = {name: start.grid.nearest(start.rows) for name, start in starts.items()}
    wild = ReconstructionConfig(learning_rate=50.0)
    found = reconstruct(block, starts, wild, iterations)
    assert block.error(values_of(found, starts)) <= block.error(values_of(nearest, starts))
    if not iterations:
        assert all(torch.equal(found[name], nearest[name]) for name in starts)


def test_what_is_learned_follows_the_seed_alone(make_block, residual_block):
    codes = []
    for seed in (0, 0, 1):
        block, starts = unet_block(make_block, residual_block)
        block = Block("", block.module, block.plans, block.sightings, block.rounding, seed, block.reference)
        torch.manual_seed(len(codes))
        codes.append(reconstruct(block, starts, FAST, 60))
    assert all(torch.equal(codes[0][name], codes[1][name]) for name in codes[0])
    assert any(not torch.equal(codes[0][name], codes[2][name]) for name in codes[0])


def test_gradients_reach_both_parts_of_a_split_layer(make_block, residual_block):
    block, starts = unet_block(make_block, residual_block)
    soft = {name: SoftRounding(start.rows, start.grid) for name, start in starts.items()}
    sighting = block.sightings[0]
    outputs = block.run(sighting, {name: rounding() for name, rounding in soft.items()})
    relative_error(tuple(output + 0.1 for output in outputs), sighting.target).backward()
    alpha = soft["conv_shortcut"].alpha
    assert bool(alpha.grad[:, :12].any(0).all())
    assert bool(alpha.grad[:, 12:].any(0).all())
    alpha.grad = None
    soft["conv_shortcut"].penalty(3.0).backward()
    assert bool(alpha.grad[:, :12].any())
    assert bool(alpha.grad[:, 12:].any())


def test_targets_of_other_inputs_raise_the_error(make_block, residual_block):
    """Inputs and outputs belong together: a set that pairs them wrongly cannot be learned from."""
    block, starts = unet_block(make_block, residual_block)
    found = reconstruct(block, starts, FAST, 60)
    targets = [sighting.target for sighting in block.sightings]
    shuffled = [
        type(sighting)(sighting.state, sighting.entering, target, sighting.intact)
        for sighting, target in zip(block.sightings, targets[1:] + targets[:1], strict=True)
    ]
    wrong = Block("", block.module, block.plans, shuffled, block.rounding, 0, block.reference)
    learned_wrong = reconstruct(wrong, starts, FAST, 60)
    right = block.error(values_of(found, starts))
    assert wrong.error(values_of(learned_wrong, starts)) > 3 * right
    assert block.error(values_of(learned_wrong, starts)) > right


def test_time_steps_of_other_inputs_raise_the_error(make_block, residual_block):
    module, inputs = residual_block()
    turned = [(x, time) for (x, _), (_, time) in zip(inputs, inputs[1:] + inputs[:1], strict=True)]
    schemes = {"conv1": W4, "conv2": W4}
    errors = []
    for entering in (inputs, turned):
        block = make_block(module, inputs, schemes, entering=entering)
        rows = {name: to_rows(layer.weight) for name, layer in block.layers.items()}
        starts = {name: Start(find_grid(values, W4, search=True), values) for name, values in rows.items()}
        errors.append(block.error(values_of(reconstruct(block, starts, FAST, 60), starts)))
    assert errors[1] > 1.2 * errors[0]


def test_the_target_stays_the_float_output_when_the_inputs_are_quantized_ones(make_block):
    torch.manual_seed(0)
    inputs = [torch.randn(30, 16) @ torch.randn(16, 16) for _ in range(4)]
    entering = [x + 0.2 * torch.randn_like(x) for x in inputs]
    block = make_block(nn.Sequential(nn.Linear(16, 8)), inputs, {"0": W4}, entering=entering)
    treated = reconstruct_weights(block, FAST, 60)
    weight = treated["0"].weight.dequantize()
    bias = treated["0"].bias.float()  # moved, so that the means agree
    wrong = sum(
        float((nn.functional.linear(x, weight, bias) - block.reference(clean)).square().sum())
        for x, clean in zip(entering, inputs, strict=True)
    )
    power = sum(float(block.reference(clean).square().sum()) for clean in inputs)
    assert treated["0"].output_error == pytest.approx((wrong / power) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("start", ["gptq", "nearest"])
def test_a_unit_is_left_as_it_was(start, make_block, residual_block):
    block, _ = unet_block(make_block, residual_block, Scheme(bits=4, act_bits=8, act_mode="static"))
    before = {name: layer.weight.clone() for name, layer in block.layers.items()}
    treated = reconstruct_weights(block, ReconstructionConfig(start=start), 5)
    assert list(treated) == list(block.layers)
    assert all(torch.equal(block.layers[name].weight, weight) for name, weight in before.items())
    assert block.error() < 1e-6  # nothing is rounded yet
    for name, found in treated.items():
        assert found.acts is not None
        assert found.weight.shape == tuple(before[name].shape)
        assert 0 < found.output_error < 0.5


def test_several_outputs_count_alike():
    wanted = (torch.ones(4), torch.full((100,), 10.0))
    mine = (torch.full((4,), 1.1), torch.full((100,), 10.0))
    assert float(relative_error(mine, wanted)) == pytest.approx(0.01 / 2, rel=1e-4)
    assert float(relative_error(wanted, wanted)) == 0


def test_a_unit_that_never_runs_is_rounded_to_nearest(make_block):
    block = make_block(nn.Sequential(nn.Linear(16, 8)), [], {"0": Scheme(bits=4, act_bits=8, act_mode="static")})
    found = reconstruct_weights(block, FAST, 5)["0"]
    rows = block.module[0].weight
    assert torch.equal(found.weight.dequantize(), find_grid(rows, W4, search=True).round(rows))
    assert found.acts.scale.tolist() == [[2 * UNSEEN / 256]]


# how many updates


def toy_denoiser():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    units = [Unit("0", (LayerPlan("0", (8, 8), W4),)), Unit("1", (LayerPlan("1", (8, 8), Scheme(bits=8)),))]
    return model, units, [DenoiserCall("unet", None, (torch.randn(3, 8),), {})]


def test_as_many_updates_as_asked_or_as_fit_into_the_time(monkeypatch):
    scene, reporter = toy_denoiser(), Reporter(quiet=True)
    assert choose_iterations(*scene, ReconstructionConfig(iterations=7), reporter) == 7
    found = choose_iterations(*scene, ReconstructionConfig(minutes=1e-9), reporter)
    assert found == LADDER[-1]
    clock = iter([0.0, 100.0, 100.3, 0.0, 100.0, 100.2])  # the second update of each unit counts
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    said = []
    monkeypatch.setattr(reporter, "say", said.append)
    assert choose_iterations(*scene, ReconstructionConfig(minutes=6), reporter) == 500  # 360 s / (1.4 * 0.5 s) = 514
    assert said == ["one update of all units takes 0.50 s here: 500 updates each"]


def test_measuring_the_time_leaves_the_weights_alone():
    model, units, calls = toy_denoiser()
    before = model[0].weight.clone()
    choose_iterations(model, units, calls, ReconstructionConfig(), Reporter(quiet=True))
    assert torch.equal(model[0].weight, before)
    assert model[0].weight.grad is None


@pytest.mark.parametrize("fields", [{"warm_up": 1}, {"iterations": -1}, {"minutes": 0}, {"start": "random"}], ids=str)
def test_fields_that_cannot_be_are_refused(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        build_config(ReconstructionConfig, **fields)


def test_inputs_may_be_given_by_name(make_block):
    block = make_block(nn.Sequential(nn.Linear(4, 4)), [torch.randn(2, 4)], {"0": W4})
    sighting = block.sightings[0]
    named = type(sighting)(None, UnitInput((), {"input": sighting.entering.args[0]}), sighting.target)
    assert torch.equal(block.run(named)[0], sighting.target[0])
