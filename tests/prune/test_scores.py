"""Scores find what does nothing and what does much; errors are those of the solver's own prediction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import nn

from dacc.core.errors import UnsupportedError
from dacc.core.reporter import silent
from dacc.prune.frames import noisy_sample
from dacc.prune.noise import Noise
from dacc.prune.scores import SCORES, of_outputs, score_units
from dacc.prune.select import Item, Rules, cheapest
from dacc.prune.task import task_gradients
from dacc.prune.teacher import Teacher, some_of
from dacc.prune.units import find_units
from dacc.runtime.clock import RunState
from dacc.runtime.passthrough import skipping
from dacc.runtime.trajectory import DenoiserCall

from . import toys

Calls = Callable[[toys.Toy], list[DenoiserCall]]


def teacher_of(toy: toys.Toy, network: nn.Module, calls: Calls, **fields: Any) -> Teacher:
    return Teacher(network, calls(toy), fields.get("guidance"), fields.get("noise", Noise()))


def scores_of(name: str, teacher: Teacher) -> dict[str, float]:
    found = score_units(name, teacher, find_units(teacher.denoiser), {}, 0, silent())
    return {unit: score.score for unit, score in found.items()}


def run_of(number: int, rows: int, calls: int, branches: tuple[str | None, ...]) -> list[DenoiserCall]:
    found = []
    for call in range(calls):
        for evaluation, branch in enumerate(branches):
            state = RunState(number, call, calls, call, calls, 900.0 - call, 1.0, evaluation, branch)
            sample = torch.zeros(rows * (2 if branch == "both" else 1), 4, 8, 8)
            found.append(DenoiserCall("transformer", state, (sample,), {}))
    return found


@pytest.mark.parametrize("branches", [(None,), ("cond", "uncond"), ("both",)])
def test_of_a_large_set_whole_runs_and_whole_calls_judge(branches):
    calls = [call for number in (-1, -2, -3) for call in run_of(number, 8, 16, branches)]
    found = some_of(calls, 16, 4)
    moments = [(call.state.run, call.state.call, call.state.evaluation) for call in found]
    places = (0, 5, 10, 15)
    assert moments == [(run, call, one) for run in (-1, -2) for call in places for one in range(len(branches))]
    assert some_of(calls, 24, 16) == some_of(calls, 1000, 1000) == calls
    assert {call.state.call for call in some_of(calls, 1, 1)} == {0}


def test_calls_without_a_run_all_judge():
    calls = [DenoiserCall("transformer", None, (torch.zeros(2, 4, 8, 8),), {}) for _ in range(4)]
    assert some_of(calls, 1, 1) == calls


@pytest.mark.parametrize("score", SCORES)
def test_a_block_that_does_nothing_is_the_first_to_go_and_one_that_does_much_the_last(score, calls_of):
    toy = toys.dit(num_layers=5)
    network = toy.build()
    network.transformer_blocks[2].norm1.linear.weight.zero_()  # gates and shifts of adaptive norms
    network.transformer_blocks[2].norm1.linear.bias.zero_()
    for name in ("attn1.to_out.0", "ff.net.2"):
        network.transformer_blocks[3].get_submodule(name).weight.mul_(30)
    found = scores_of(score, teacher_of(toy, network, calls_of))
    order = sorted(found, key=found.__getitem__)
    assert order[0] == "transformer_blocks.2"
    if score != "taylor":  # a slope at the weights as they are does not tell how far away none of them is
        assert order[-1] == "transformer_blocks.3"
    assert found["transformer_blocks.2"] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("make", [toys.unet_condition, toys.spatio_temporal, toys.motion, toys.unet3d, toys.flux])
def test_every_kind_of_unit_has_a_score(score, make, calls_of):
    toy = make()
    found = scores_of(score, teacher_of(toy, toy.build(), calls_of))
    assert all(value > 0 for value in found.values()), found


def test_the_error_is_that_of_the_outputs_written_down_slowly(calls_of):
    toy = toys.pixart()
    network, removed = toy.build(), ["transformer_blocks.1", "transformer_blocks.2"]
    teacher = teacher_of(toy, network, calls_of)
    found = teacher.errors(removed).relative
    errors = []
    whole = [call.replay(network)[0][:, :4] for call in calls_of(toy)]
    kept = [block for place, block in enumerate(network.transformer_blocks) if place not in (1, 2)]
    network.transformer_blocks = nn.ModuleList(kept)
    for call, wanted in zip(calls_of(toy), whole, strict=True):
        errors.append(((call.replay(network)[0][:, :4] - wanted) ** 2).sum().item() / (wanted**2).sum().item())
    assert found == pytest.approx(sum(errors) / 3, rel=1e-5)


@pytest.mark.parametrize("apart", [False, True], ids=["in one batch", "one after the other"])
def test_guidance_branches_are_combined_as_the_pipeline_does_it(apart):
    toy = toys.dit(out_channels=4)
    network = toy.build()
    torch.manual_seed(0)
    sample = torch.randn(1, 4, 8, 8)
    inputs = {"hidden_states": sample, "timestep": torch.tensor([5]), "class_labels": torch.tensor([1])}
    empty = inputs | {"class_labels": torch.tensor([10])}
    state = RunState(-1, 0, 1, 0, 1, 5.0, 1.0, 0, "cond" if apart else "both")
    if apart:
        other = RunState(-1, 0, 1, 0, 1, 5.0, 1.0, 1, "uncond")
        calls = [DenoiserCall("t", state, (), inputs), DenoiserCall("t", other, (), empty)]
    else:
        calls = [DenoiserCall("t", state, (), {key: torch.cat([inputs[key], empty[key]]) for key in inputs})]

    def guided() -> torch.Tensor:
        with torch.no_grad():
            given, nothing = (network(**given).sample for given in (inputs, empty))
        return nothing + 3.0 * (given - nothing)

    wanted = guided()
    found = Teacher(network, calls, 3.0, Noise()).errors(["transformer_blocks.1"]).relative
    network.transformer_blocks = nn.ModuleList(
        [block for place, block in enumerate(network.transformer_blocks) if place != 1]
    )
    change = guided() - wanted
    assert found == pytest.approx((change.square().sum() / wanted.square().sum()).item(), rel=1e-4)


def test_of_videos_frames_and_their_differences_are_told_apart(calls_of):
    toy = toys.motion()
    network = toy.build()
    teacher = teacher_of(toy, network, calls_of)
    unit = find_units(network)[0]
    found = teacher.errors(unit.modules)
    whole = [call.replay(network)[0] for call in calls_of(toy)]
    content, motion = 0.0, 0.0
    with skipping(network, unit.modules):
        for call, wanted in zip(calls_of(toy), whole, strict=True):
            change = call.state.sigma * (call.replay(network)[0] - wanted)  # (B, C, F, H, W), of the clean sample
            content += change.square().mean().item() / 3
            motion += (change[:, :, 1:] - change[:, :, :-1]).square().mean().item() / 3
    assert (found.content, found.motion) == (pytest.approx(content, rel=1e-4), pytest.approx(motion, rel=1e-4))
    alone = [{"relative": 9.0, "content": content, "motion": motion} for content, motion in ((1, 1), (2, 1), (4, 3))]
    assert [of_outputs(errors, alone) for errors in alone] == [0.5 + 2, 1 + 2, 2 + 6]


def test_the_task_loss_has_a_gradient_where_that_to_the_network_itself_has_none(calls_of):
    toy = toys.dit()
    network = toy.build()
    teacher = teacher_of(toy, network, calls_of)
    weights = dict(network.transformer_blocks[1].named_parameters())
    levels = task_gradients(teacher, weights, 0, silent())
    assert len(levels) == 3
    assert all(loss > 0 and any(value != 0 for value in products.values()) for loss, products in levels)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def with_conditions(toy: toys.Toy, axis: int) -> toys.Toy:
    """The same with a picture to go by, as channels behind those that are noisy."""

    def inputs() -> dict[str, Any]:
        found = toy.inputs()
        name = "sample" if "sample" in found else "hidden_states"
        return found | {name: torch.cat([found[name], torch.randn_like(found[name])], axis)}

    channels = toy.config.get("in_channels", 4)
    return replace(toy, config=toy.config | {"in_channels": 2 * channels, "out_channels": channels}, inputs=inputs)


@pytest.mark.parametrize(
    ("make", "axis"),
    [(toys.unet_condition, 1), (toys.spatio_temporal, 2), (toys.wan, 1), (toys.cogvideox, 2), (toys.flux, 2)],
)
def test_conditions_that_come_as_channels_stay_as_they_are(make, axis, calls_of):
    toy = with_conditions(make(), axis)
    network = toy.build()
    teacher, entered = teacher_of(toy, network, calls_of), []
    network.register_forward_pre_hook(
        lambda _, args, kwargs: entered.append(kwargs.get("sample", kwargs.get("hidden_states"))), with_kwargs=True
    )
    assert all(value > 0 for value in scores_of("taylor", teacher).values())
    given = [noisy_sample(call).chunk(2, axis) for call in teacher.calls]
    for (noisy, conditions), found in zip(given, entered[-len(given) :], strict=True):
        assert torch.equal(found.chunk(2, axis)[1], conditions)
        assert not torch.equal(found.chunk(2, axis)[0], noisy)


@pytest.mark.parametrize("target", ["epsilon", "v_prediction", "sample", "flow"])
def test_clean_samples_noise_and_outputs_are_one_relation(target):
    noise, level = Noise(target), 0.7
    torch.manual_seed(0)
    clean, added = torch.randn(2, 3), torch.randn(2, 3)
    entered, wanted = noise.mixed(clean, added, level), noise.wanted(clean, added, level)
    assert torch.allclose(noise.clean(entered, wanted, level), clean, atol=1e-6)
    moved = noise.clean(entered, wanted + 0.01, level) - clean
    state = RunState(1, 0, 1, 0, 1, 0.0, level)
    factor = noise.clean_factor(state)
    assert moved.abs().mean().item() == pytest.approx(0.01 * factor, rel=1e-3)


def test_calls_without_noise_levels_cannot_be_scored_by_taylor():
    toy = toys.dit()
    call = DenoiserCall("t", None, (), toy.inputs())
    with pytest.raises(UnsupportedError, match="noise levels.*out_mse"):
        scores_of("taylor", Teacher(toy.build(), [call], None, Noise()))


def test_schedulers_that_scale_samples_in_a_way_of_their_own_are_no_case_for_taylor(calls_of):
    toy, noise = toys.dit(), Noise("epsilon", is_plain=False)
    teacher = teacher_of(toy, toy.build(), calls_of, noise=noise)
    with pytest.raises(UnsupportedError, match="EDM.*out_mse"):
        scores_of("taylor", teacher)
    assert noise.clean_factor(teacher.calls[0].state) == 1.0  # not known


def test_the_chosen_set_is_better_than_most_of_its_size(calls_of):
    toy = toys.dit(num_layers=8)
    network = toy.build()
    for place, block in enumerate(network.transformer_blocks):
        block.ff.net[2].weight.mul_(0.3 + 0.4 * (place * 5 % 8))
    teacher = teacher_of(toy, network, calls_of)
    units, scores = find_units(network), scores_of("out_mse", teacher)
    items = [Item(scores[unit.name], 1, unit.stack, unit.position) for unit in units]
    chosen = cheapest(items, 2, Rules(allow_adjacent=True))
    errors = {
        places: teacher.errors([units[place].modules[0] for place in places]).relative
        for places in combinations(range(len(units)), 2)
    }
    ordered = sorted(errors.values())
    assert errors[chosen] < ordered[len(ordered) // 2]
