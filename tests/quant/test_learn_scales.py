"""Learned activation scales: the rounding they learn through, and that they are never worse than at the start."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from dacc.core.scheme import Scheme
from dacc.quant.block import Treated
from dacc.quant.learn_scales import LearnedScale, learn_scales, round_straight
from dacc.quant.methods.rtn import RTNConfig, quantize
from dacc.quant.ranges import find_scales, quantized_weights, roundings_of
from dacc.quant.simulate import rounding_of
from dacc.runtime.activation import ActivationScale
from dacc.runtime.clock import fixed_run

STATIC = Scheme(bits=4, act_bits=4, act_mode="static")
PER_STEP = Scheme(bits=4, act_bits=4, act_mode="per-step", act_steps=3)


def table(rows, parts):
    sizes = 1 + torch.arange(rows * parts).view(rows, parts) / 4
    return ActivationScale(0.2 * sizes, (2 + torch.arange(rows * parts).view(rows, parts)).to(torch.uint8))


@pytest.mark.parametrize("split", [None, 5])
@pytest.mark.parametrize("scheme", [STATIC, PER_STEP], ids=lambda scheme: scheme.name)
def test_it_rounds_as_the_kernels_do(scheme, split, state):
    scheme = scheme.model_copy(update={"split": split})
    acts, layer = table((scheme.act_steps or 0) + 1, scheme.parts), nn.Conv2d(8, 4, 1)
    learner, x = LearnedScale(acts, 4, 1, split), torch.randn(3, 8, 5, 5)
    expected = rounding_of(scheme, layer, acts)
    for call in range(3):
        with fixed_run(state(call)):
            torch.testing.assert_close(learner(x), expected(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(learner.result().scale, acts.scale)
    assert torch.equal(learner.result().zero_point, acts.zero_point)


def test_rounding_passes_gradients_on_as_they_come():
    x = torch.tensor([0.2, 1.7], requires_grad=True)
    y = round_straight(x)
    assert y.tolist() == [0.0, 2.0]
    y.backward(torch.tensor([3.0, -1.0]))
    assert x.grad.tolist() == [3.0, -1.0]


def test_the_scale_has_the_gradient_of_a_learned_step_size():
    scale, zero = 0.3, 4
    learner = LearnedScale(ActivationScale(torch.tensor([[scale]]), torch.tensor([[zero]])), 4, -1, None)
    x = torch.tensor([-9.0, -0.4, 0.1, 0.77, 9.0])
    for index, value in enumerate(x.tolist()):
        learner.zero_grad()
        learner(x)[index].backward()
        code = round(value / scale) + zero
        inside = 0 <= code <= 15
        step = round(value / scale) - value / scale if inside else min(max(code, 0), 15) - zero
        assert learner.rows[0].grad.item() == pytest.approx(scale * step, abs=1e-5)  # of the logarithm


def test_only_the_row_of_the_call_learns(state):
    learner = LearnedScale(table(4, 1), 4, -1, None)
    with fixed_run(state(1)):
        learner(torch.randn(3, 8)).sum().backward()
    assert [row.grad is not None for row in learner.rows] == [False, True, False, False]


def scene(make_block, scheme):
    """A unit with quantized weights and scales that are twice too large."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 8))
    block = make_block(module, [torch.randn(40, 16) for _ in range(6)], {"0": scheme, "2": scheme})
    treated = {name: Treated(quantize(layer.weight, scheme, RTNConfig())) for name, layer in block.layers.items()}
    found = {name: ActivationScale(2 * acts.scale, acts.zero_point) for name, acts in find_scales(block).items()}
    return block, {name: Treated(part.weight, found.get(name)) for name, part in treated.items()}


def error(block, treated):
    with quantized_weights(block, treated), block.rounding.instead(roundings_of(block, treated)):
        return block.error()


@pytest.mark.parametrize("scheme", [STATIC, PER_STEP], ids=lambda scheme: scheme.name)
def test_rank_is_below_the_scales_at_the_start(scheme, make_block):
    block, start = scene(make_block, scheme)
    with quantized_weights(block, start):
        found = learn_scales(block, start, 80, 3e-2)
    assert error(block, found) < 0.9 * error(block, start)
    for name in found:
        assert found[name].weight is start[name].weight
        assert torch.equal(found[name].acts.zero_point, start[name].acts.zero_point)
        assert (found[name].acts.scale > 0).all()


def test_the_errors_that_are_told_are_those_with_the_scales_that_were_learned(make_block):
    block, start = scene(make_block, STATIC)
    before = error(block, start)
    start = {name: replace(found, output_error=before if name == "0" else None) for name, found in start.items()}
    with quantized_weights(block, start):
        found = learn_scales(block, start, 80, 3e-2)
    assert found["0"].output_error == pytest.approx(error(block, found), rel=1e-5)
    assert found["0"].output_error < 0.9 * before
    assert all(one.output_error is None for name, one in found.items() if name != "0")


@pytest.mark.parametrize("rate", [1e-9, 100.0])
def test_it_is_never_worse_than_the_start(rate, make_block):
    block, start = scene(make_block, STATIC)
    before = error(block, start)
    with quantized_weights(block, start):
        found = learn_scales(block, start, 8, rate)
    assert error(block, found) <= before * (1 + 1e-6)


def test_what_is_learned_follows_the_seed_alone(make_block):
    scales = []
    for noise in (1, 2):
        block, start = scene(make_block, STATIC)
        torch.manual_seed(noise)
        with quantized_weights(block, start):
            scales.append(learn_scales(block, start, 20, 1e-2)["0"].acts.scale)
    assert torch.equal(*scales)


def test_no_updates_or_nothing_to_learn_change_nothing(make_block):
    block, start = scene(make_block, STATIC)
    assert learn_scales(block, start, 0, 1e-2) is start
    for scheme in (Scheme(bits=4), Scheme(bits=4, act_bits=8, act_mode="dynamic")):
        block, start = scene(make_block, scheme)
        assert learn_scales(block, start, 5, 1e-2) is start
