"""Masks that are learned: what they do to a network, and what is learned."""

from __future__ import annotations

import copy
from itertools import combinations
from typing import Any

import pytest
import torch

from dacc.core.reporter import silent
from dacc.prune import masks
from dacc.prune.masks import FACTOR, Group, learn_masks, masked, straight_through
from dacc.prune.methods.tinyfusion import TinyFusionConfig
from dacc.prune.noise import Noise
from dacc.prune.teacher import Teacher
from dacc.prune.units import find_units
from dacc.runtime.passthrough import skipping

from . import toys
from .conftest import liven

CONFIG = TinyFusionConfig(mask_updates=80, mask_rank=2, mask_learning_rate=0.003)


def output(network: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return network(**inputs)[0]


@pytest.mark.parametrize("make", [toys.dit, toys.pixart, toys.flux, toys.sd3, toys.unet2d, toys.motion])
def test_a_mask_of_one_is_the_module_and_of_zero_its_absence(make):
    toy = make()
    network, inputs = liven(toy.build()), toy.inputs()
    names = find_units(network)[0].modules
    whole = output(network, inputs)
    with skipping(network, names):
        without = output(network, inputs)
    for gate, wanted in ((1.0, whole), (0.0, without)):
        with masked(network, dict.fromkeys(names, torch.tensor(gate))):
            torch.testing.assert_close(output(network, inputs), wanted)
    assert torch.equal(output(network, inputs), whole)
    assert not torch.allclose(whole, without)


def test_a_draw_is_one_pattern_with_the_gradient_of_the_relaxed_draw():
    logits = torch.nn.Parameter(torch.tensor([0.01, -0.02, 0.0]))
    wanted, temperature = torch.tensor([1.0, 2.0, 5.0]), 2.0
    drawn = straight_through(logits, temperature, torch.Generator().manual_seed(1))
    assert sorted(drawn.detach().round(decimals=6).tolist()) == [0, 0, 1]
    (drawn @ wanted).backward()
    uniform = torch.rand(3, generator=torch.Generator().manual_seed(1))
    gumbel = -torch.log(-torch.log(uniform))
    soft = torch.softmax((FACTOR * logits.detach() + gumbel) / temperature, 0)
    slow = [
        sum(wanted[j] * soft[j] * (float(i == j) - soft[i]) for j in range(3)) * FACTOR / temperature for i in range(3)
    ]
    torch.testing.assert_close(logits.grad, torch.stack(slow))


def test_draws_follow_the_logits():
    draw = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.02, 0.0])  # factors e^2 : 1
    rows = torch.stack([straight_through(logits, 4.0, draw) for _ in range(2000)])
    assert rows[:, 0].mean().item() == pytest.approx(torch.softmax(FACTOR * logits, 0)[0].item(), abs=0.03)


def idle_(block: Any) -> None:
    """A block of DiT that does nothing."""
    block.norm1.linear.weight.data.zero_()  # gates and shifts
    block.norm1.linear.bias.data.zero_()


def groups_of(network: Any, size: int, count: int) -> list[Group]:
    units = find_units(network)
    rows = [units[start : start + size] for start in range(0, len(units), size)]
    return [Group(tuple(row), tuple(combinations(range(len(row)), count))) for row in rows]


@pytest.fixture
def idle(calls_of):
    """Six blocks, of which two do nothing."""
    toy = toys.dit(num_layers=6)
    network = liven(toy.build())
    for place in (2, 4):
        idle_(network.transformer_blocks[place])
    return Teacher(network, calls_of(toy), None, Noise())


def test_what_does_nothing_goes_and_the_whole_network_stays_as_it_was(idle):
    before = copy.deepcopy(idle.denoiser.state_dict())
    groups = groups_of(idle.denoiser, 3, 1)
    found = learn_masks(idle, groups, CONFIG, 0, {}, silent())
    assert found.removed == ("transformer_blocks.2", "transformer_blocks.4")
    assert all(torch.equal(value, before[name]) for name, value in idle.denoiser.state_dict().items())
    assert not any("parametrizations" in name for name in idle.denoiser.state_dict())
    for group in groups:
        likely = [found.kept[unit.name] for unit in group.units]
        assert sum(likely) == pytest.approx(len(likely) - 1, abs=1e-5)
        assert [unit.name for unit in group.units][likely.index(min(likely))] in found.removed


def test_the_choice_beats_the_mean_of_all_choices(idle):
    (group,) = groups_of(idle.denoiser, 6, 2)
    found = learn_masks(idle, [group], CONFIG, 0, {}, silent())
    errors = [
        idle.errors([name for place in pattern for name in group.units[place].modules]).relative
        for pattern in group.patterns
    ]
    assert idle.errors(found.removed).relative < sum(errors) / len(errors)


def test_equal_seeds_learn_the_same_and_what_is_known_is_not_learned_again(idle, monkeypatch):
    groups, known, other = groups_of(idle.denoiser, 3, 1), dict[str, Any](), dict[str, Any]()
    few = CONFIG.model_copy(update={"mask_updates": 5})
    first = learn_masks(idle, groups, few, 3, known, silent())
    learn_masks(idle, groups, few, 3, other, silent())
    assert known == other
    learn_masks(idle, groups, few, 4, other := {}, silent())
    assert known != other
    monkeypatch.setattr(masks, "_learned", lambda *_: pytest.fail("learned again"))
    assert learn_masks(idle, groups, few, 3, known, silent()) == first
