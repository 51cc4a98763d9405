"""The set with the least sum of scores, within the rules."""

from __future__ import annotations

import pytest

from dacc.core.errors import ConfigError, UnsupportedError

from .. import toys
from ..asked import ask, select, share

BLOCK = "transformer_blocks.{}".format


def test_the_units_that_are_missed_least_go():
    scores = {BLOCK(1): 0.1, BLOCK(2): 0.1, BLOCK(4): 0.3, BLOCK(6): 0.2}
    request = ask(toys.pixart(), 0.3, scores)
    removed = select("score", request)
    assert share(request, removed) >= 0.95 * 0.3
    deep = toys.dit(num_layers=9)
    request = ask(deep, 0.3, scores)
    assert select("score", request) == (BLOCK(1), BLOCK(4), BLOCK(6))
    assert select("score", ask(deep, 0.3, scores, allow_adjacent=True)) == (BLOCK(1), BLOCK(2), BLOCK(6))


def test_groups_spread_what_goes():
    scores = {BLOCK(place): 0.1 for place in (5, 6, 7)}
    request = ask(toys.dit(num_layers=9), 0.2, scores, allow_adjacent=True)
    assert len({int(name[-1]) // 4 for name in select("score", request)}) == 1
    assert len({int(name[-1]) // 4 for name in select("score", request, groups="3:4")}) == 2


def test_a_ratio_out_of_reach_names_the_nearest_and_it_can_be_met():
    request = ask(toys.dit(num_layers=9), 0.9)
    with pytest.raises(UnsupportedError, match=r"--ratio 0\.\d+ or less.*--allow-adjacent") as refused:
        select("score", request)
    nearest = float(refused.value.mend.split("--ratio ")[1].split()[0])
    request = ask(toys.dit(num_layers=9), nearest)
    assert share(request, select("score", request)) == pytest.approx(nearest, abs=1e-3)


def test_strictly_a_video_network_keeps_its_middle():
    free = select("score", ask(toys.spatio_temporal(), 0.1, {"mid_block": 0.0}))
    assert free == ("mid_block",)
    strict = select("score", ask(toys.spatio_temporal(), 0.1, strict=True))
    assert "mid_block" not in strict


def test_groups_of_a_unet_and_groups_of_nothing_are_refused():
    with pytest.raises(ConfigError, match="pairs of layers"):
        select("score", ask(toys.motion(), 0.1), groups="3:4")
    with pytest.raises(ConfigError, match="N below M"):
        select("score", ask(toys.dit(), 0.1), groups="4:3")
