"""Fixed patterns of U-Nets, even distances of transformers."""

from __future__ import annotations

from itertools import pairwise

import pytest

from dacc.core.errors import ConfigError, UnsupportedError
from dacc.prune.remove import plan_removal

from .. import toys
from ..asked import ask, select, share

TYPES = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}


def config_after(request, removed):
    return plan_removal(request.class_name, request.config, request.sizes, removed).config


def test_the_three_patterns_of_a_unet_are_told_by_its_config():
    request = ask(toys.unet_condition(**toys.WIDE, **TYPES))
    base, small, tiny = (select("bksdm", request, size=size) for size in ("base", "small", "tiny"))
    assert (config_after(request, base)["layers_per_block"], "mid_block" in base) == (1, False)
    assert config_after(request, small)["mid_block_type"] is None
    assert config_after(request, tiny)["block_out_channels"] == [8, 16]
    assert share(request, base) < share(request, small) < share(request, tiny)
    assert select("bksdm", request) == base


def test_the_smallest_pattern_that_reaches_the_ratio_is_taken():
    wide = toys.unet_condition(**toys.WIDE, **TYPES)
    for size in ("base", "small", "tiny"):
        removed = select("bksdm", ask(wide), size=size)
        request = ask(wide, share(ask(wide), removed))
        assert select("bksdm", request) == removed
    with pytest.raises(UnsupportedError, match="--ratio 0"):
        select("bksdm", ask(wide, 0.95))


def test_where_no_stage_can_go_tiny_is_refused():
    with pytest.raises(UnsupportedError, match="as many channels"):
        select("bksdm", ask(toys.unet_condition()), size="tiny")


def test_a_size_that_would_remove_nothing_is_refused_with_one_that_does():
    one_layer = ask(toys.unet_condition(layers_per_block=1))
    with pytest.raises(UnsupportedError, match="one layer alone.*Use --set size=small"):
        select("bksdm", one_layer, size="base")
    assert select("bksdm", one_layer, size="small") == select("bksdm", one_layer) == ("mid_block",)


def test_small_is_refused_where_the_middle_has_to_stay():
    strict = ask(toys.motion(), strict=True)
    with pytest.raises(UnsupportedError, match="no middle block.*Use --set size=base, or leave --strict-config out"):
        select("bksdm", strict, size="small")
    assert select("bksdm", strict, size="base") == select("bksdm", strict)


@pytest.mark.parametrize(
    ("layers", "ratio", "places"), [(9, 0.2, (3, 6)), (9, 0.1, (4,)), (10, 0.3, (2, 4, 7)), (9, 0.4, (1, 3, 5, 7))]
)
def test_blocks_of_a_transformer_go_at_even_distances(layers, ratio, places):
    removed = select("bksdm", ask(toys.dit(num_layers=layers), ratio))
    found = tuple(int(name.rpartition(".")[2]) for name in removed)
    assert len(found) == len(places)
    assert all(abs(one - other) <= 1 for one, other in zip(found, places, strict=True)), found


@pytest.mark.parametrize(
    ("ratio", "allow_adjacent"), [(0.1, False), (0.3, False), (0.25, True), (0.5, True), (0.7, True)]
)
def test_every_list_of_blocks_gives_its_share_at_even_distances(ratio, allow_adjacent):
    request = ask(toys.flux(num_layers=19, num_single_layers=38), ratio, allow_adjacent=allow_adjacent)
    removed = select("bksdm", request)
    assert 0.95 * ratio <= share(request, removed) < ratio + 0.03
    shares = []
    for stack in ("transformer_blocks", "single_transformer_blocks"):
        units = [unit for unit in request.units if unit.stack == stack]
        gone = [place for place, unit in enumerate(units) if unit.modules[0] in removed]
        shares.append(len(gone) / len(units))
        apart = [later - before for before, later in pairwise([-1, *gone, len(units)])]
        assert max(apart[1:-1]) - min(apart[1:-1]) <= 1
        assert abs(apart[0] - apart[-1]) <= 1
        assert allow_adjacent or min(apart[1:-1]) > 1
    assert abs(shares[0] - shares[1]) <= 1 / 15  # of one block of the shorter list


def test_more_than_fits_apart_is_refused():
    request = ask(toys.flux(num_layers=19, num_single_layers=38), 0.6)
    with pytest.raises(UnsupportedError, match="--allow-adjacent"):
        select("bksdm", request)


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(ConfigError, match="--ratio"):
        select("bksdm", ask(toys.dit()))
    with pytest.raises(ConfigError, match="for U-Nets"):
        select("bksdm", ask(toys.dit(), 0.2), size="base")
    with pytest.raises(ConfigError, match="Give one of them"):
        select("bksdm", ask(toys.motion(), 0.2), size="base")


def test_a_pattern_out_of_reach_does_not_ask_for_neighbours_which_it_takes_anyway():
    with pytest.raises(UnsupportedError, match=r"or less\.$"):
        select("bksdm", ask(toys.unet_condition(layers_per_block=3), 0.95))
