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
    deep = select("vdmini", request, deep=True)
    assert (layers(request, deep), "mid_block" in deep) == ([2, 1, 1], True)


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
    assert 0.19 * 0.95 <= share(request, removed) <= 0.27
    with pytest.raises(UnsupportedError, match="at most 0.2"):
        select("vdmini", ask(toy, 0.5))
    with pytest.raises(ConfigError, match="for U-Nets"):
        select("vdmini", ask(toy), deep=True)
