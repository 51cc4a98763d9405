"""Shallow layers go and deep ones stay."""

from __future__ import annotations

import pytest

from dacc.core.errors import ConfigError, UnsupportedError
from dacc.prune.remove import plan_removal

from .. import toys
from ..asked import ask, select, share

THREE = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion", "DownBlockMotion"),
    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion"),
}


def layers(request, removed):
    return plan_removal(request.class_name, request.config, request.sizes, removed).config["layers_per_block"]


def test_of_a_unet_all_stages_but_the_deepest_lose_a_layer_and_the_middle_goes():
    request = ask(toys.motion(**THREE))
    removed = select("vdmini", request)
    assert (layers(request, removed), "mid_block" in removed) == ([1, 1, 2], True)


def test_the_control_is_of_the_size_of_what_it_is_compared_with():
    for toy in (toys.motion(**THREE), toys.motion(**THREE | {"block_out_channels": (8, 16, 32)})):
        request = ask(toy)
        usual, deep = select("vdmini", request), select("vdmini", request, deep=True)
        stages = [select("vdmini", ask(toy, ratio), deep=True) for ratio in (0.01, share(request, deep) + 0.02)]
        assert "mid_block" in deep
        assert layers(request, deep)[0] == 2
        assert all(
            abs(share(request, deep) - share(request, usual)) <= abs(share(request, other) - share(request, usual))
            for other in stages
        )


def test_a_ratio_takes_as_many_stages_as_it_needs():
    whole = ask(toys.motion(**THREE))
    shares = []
    for wanted in ([1, 2, 2], [1, 1, 2], 1):
        ratio = 0.01 if not shares else shares[-1] + 0.05
        removed = select("vdmini", ask(toys.motion(**THREE), ratio))
        assert layers(whole, removed) == wanted
        shares.append(share(whole, removed))
    with pytest.raises(UnsupportedError, match="--ratio 0"):
        select("vdmini", ask(toys.motion(**THREE), 0.99))


def test_a_unet_without_pairs_is_refused():
    with pytest.raises(UnsupportedError, match="one layer alone"):
        select("vdmini", ask(toys.motion(layers_per_block=1)))


def test_of_a_transformer_the_last_third_stays_and_a_fifth_goes_at_most():
    toy = toys.dit(num_layers=12)
    request = ask(toy, None, {f"transformer_blocks.{place}": 0.0 for place in (8, 9, 10)})
    removed = select("vdmini", request)
    assert all(int(name.rpartition(".")[2]) < 8 for name in removed)
    block = request.costs["transformer_blocks.5"] / request.total
    assert 0.2 - block < share(request, removed) <= 0.2
    with pytest.raises(UnsupportedError, match="at most 0.2"):
        select("vdmini", ask(toy, 0.5))
    with pytest.raises(ConfigError, match="for U-Nets"):
        select("vdmini", ask(toy), deep=True)


@pytest.mark.parametrize(
    "toy", [toys.dit(num_layers=9), toys.flux(num_layers=7, num_single_layers=9), toys.hunyuan_dit(num_layers=40)]
)
def test_a_fifth_is_not_passed_whatever_blocks_weigh_and_the_nearest_ratio_can_be_met(toy):
    request = ask(toy)
    removed = select("vdmini", request)
    assert 0 < share(request, removed) <= 0.2
    with pytest.raises(UnsupportedError, match="--ratio") as refused:
        select("vdmini", ask(toy, 0.9))
    nearest = float(refused.value.mend.split("--ratio ")[1].split()[0])
    assert 0.95 * nearest <= share(request, select("vdmini", ask(toy, nearest))) <= 0.2


def test_the_mirror_of_a_block_is_not_in_the_last_third_either():
    removed = select("vdmini", ask(toys.hunyuan_dit(num_layers=40)))
    assert {int(name.rpartition(".")[2]) for name in removed} <= set(range(40 - 40 // 3))
    with pytest.raises(UnsupportedError, match=r"last third.* 0\. Use --method score"):
        select("vdmini", ask(toys.dit(num_layers=2)))


def test_another_choice_of_layers_and_blocks_is_refused():
    for settings in ({"groups": "3:4"}, {"units": "depth"}):
        with pytest.raises(ConfigError, match="--method score"):
            select("vdmini", ask(toys.motion()), **settings)
    with pytest.raises(ConfigError, match="for transformers"):
        select("vdmini", ask(toys.motion()), by="latency")
    with pytest.raises(ConfigError, match="fixed pattern"):
        select("vdmini", ask(toys.motion()), score="bi")


def test_a_pattern_out_of_reach_does_not_ask_for_neighbours_which_it_takes_anyway():
    with pytest.raises(UnsupportedError, match=r"or less\.$"):
        select("vdmini", ask(toys.motion(layers_per_block=3), 0.95))
