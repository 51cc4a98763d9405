"""Groups whose masks are learned, and the method from end to end."""

from __future__ import annotations

import pytest

import dacc
from dacc.core.errors import ConfigError, UnsupportedError
from dacc.core.manifest import read_manifest
from dacc.prune.methods.tinyfusion import TinyFusionConfig, groups

from .. import toys
from ..asked import ask


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4, 0.5])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_group_loses_its_share_and_together_they_meet_the_ratio(ratio, size):
    request = ask(toys.dit(num_layers=11), ratio)
    found = groups(request, TinyFusionConfig(group=size))
    assert [unit.name for group in found for unit in group.units] == [unit.name for unit in request.units]
    assert all(len(group.units) == size for group in found[:-1])
    counts = [len(group.patterns[0]) for group in found]
    assert all(
        {len(pattern) for pattern in group.patterns} == {count} for group, count in zip(found, counts, strict=True)
    )
    gone = sum(
        sum(request.costs[unit.name] for unit in group.units[:count])
        for group, count in zip(found, counts, strict=True)
    )
    assert gone >= request.needed()
    assert gone - max(request.costs.values()) < request.needed()
    assert max(counts[:-1], default=0) - min(counts[:-1], default=0) <= 1


def test_a_pattern_is_any_choice_of_so_many():
    request = ask(toys.dit(num_layers=9), 0.4)
    first = groups(request, TinyFusionConfig(group=4))[0]
    count = len(first.patterns[0])
    assert len(first.patterns) == len(set(first.patterns)) == {1: 4, 2: 6, 3: 4}[count]


@pytest.mark.parametrize("ratio", [0.02, 0.05, 0.2, 0.35, 0.4])
@pytest.mark.parametrize(
    "toy", [toys.flux(num_layers=4, num_single_layers=7), toys.sd3(), toys.motion(), toys.unet_condition(), toys.sdxl()]
)
def test_no_more_goes_than_one_unit_beyond_the_ratio(toy, ratio):
    request = ask(toy, ratio)
    found, largest = groups(request, TinyFusionConfig()), max(request.costs.values())
    least, most = 0, 0
    for group in found:
        costs = [sum(request.costs[group.units[at].name] for at in pattern) for pattern in group.patterns]
        least, most = least + min(costs), most + max(costs)
    assert request.needed() <= least
    assert least < request.needed() + largest
    assert most < request.needed() + 2 * largest  # units of a stack may differ


def test_of_a_unet_every_set_that_is_just_large_enough_is_a_pattern():
    request = ask(toys.motion(layers_per_block=3), 0.35)
    costs, needed = [request.costs[unit.name] for unit in request.units], request.needed()
    (group,) = groups(request, TinyFusionConfig())

    def enough(chosen: set[int]) -> bool:
        return sum(costs[place] for place in chosen) >= needed

    sets = [{place for place in range(len(costs)) if number >> place & 1} for number in range(2 ** len(costs))]
    wanted = [chosen for chosen in sets if enough(chosen) and not any(enough(chosen - {one}) for one in chosen)]
    assert len(wanted) > 1
    assert {frozenset(pattern) for pattern in group.patterns} == {frozenset(chosen) for chosen in wanted}


def test_the_units_of_a_unet_have_no_size_of_groups():
    with pytest.raises(ConfigError, match="for transformers"):
        groups(ask(toys.motion(layers_per_block=3), 0.35), TinyFusionConfig(group=2))


def test_a_ratio_out_of_reach_names_the_nearest():
    with pytest.raises(UnsupportedError, match=r"--ratio 0\.\d+ or less\.$"):  # neighbours may go as it is
        groups(ask(toys.dit(num_layers=9), 0.95), TinyFusionConfig())


def test_a_pipeline_is_pruned_by_learned_masks_and_loads(deep_dit, pruned):
    settings = {"mask_updates": 3, "mask_rank": 2}
    bundle = pruned(deep_dit, method="tinyfusion", ratio=0.3, settings=settings)
    record = read_manifest(bundle).components["transformer"].pruning
    removed = {name for name, unit in record.units.items() if unit.removed}
    assert record.method == "tinyfusion"
    assert removed
    assert record.error > 0
    assert all(0 <= unit.score <= 1 for unit in record.units.values())
    pipe = dacc.load(bundle, device="cpu")
    assert len(pipe.transformer.transformer_blocks) == 6 - len(removed)
    again = pruned(deep_dit, method="tinyfusion", ratio=0.3, settings=settings, measure="auto")
    assert read_manifest(again).components["transformer"].pruning.units == record.units
