"""Every unit can go, and so can all of them that the rules allow together."""

from __future__ import annotations

import pytest
import torch

from dacc.core.errors import UnsupportedError
from dacc.prune.remove import plan_removal
from dacc.prune.units import find_units, sizes_of

from . import toys

ALL = {
    "unet2d": toys.unet2d, "condition": toys.unet_condition, "sdxl": toys.sdxl, "motion": toys.motion,
    "spatio-temporal": toys.spatio_temporal, "3d": toys.unet3d, "dit": toys.dit, "pixart": toys.pixart,
    "sd3": toys.sd3, "flux": toys.flux, "flux2": toys.flux2, "hunyuan video": toys.hunyuan_video,
    "hunyuan dit": toys.hunyuan_dit, "wan": toys.wan, "ltx": toys.ltx, "cogvideox": toys.cogvideox,
    "qwen image": toys.qwen_image, "sana": toys.sana,
}  # fmt: skip


@pytest.mark.parametrize("strict", [False, True], ids=["free", "strict"])
@pytest.mark.parametrize("name", ALL)
def test_each_unit_and_all_together_can_be_removed(name, strict):
    toy = ALL[name]()
    with torch.device("meta"):
        network = toy.model(**toy.config)
    sizes, units = sizes_of(network), find_units(network, strict=strict)
    assert len({unit.name for unit in units}) == len(units)
    for removed in (*(unit.modules for unit in units), tuple(name for unit in units for name in unit.modules)):
        removal = plan_removal(type(network).__name__, network.config, sizes, removed)
        assert not (strict and removal.identity)
    assert all(unit.parameters == sum(sizes[name] for name in unit.modules) > 0 for unit in units)
    for unit in units:
        assert all(first in unit.modules and last in unit.modules for first, last in unit.sites)


def test_the_ends_of_long_lists_are_protected():
    def places(layers: int) -> list[int]:
        with torch.device("meta"):
            network = toys.pixart().model(**toys.pixart().config | {"num_layers": layers})
        return [unit.position for unit in find_units(network)]

    assert places(7) == list(range(7))
    assert places(8) == list(range(1, 7))
    assert places(16) == list(range(2, 14))
    assert places(40) == list(range(2, 38))


def test_what_a_network_reads_or_builds_apart_is_no_unit():
    assert [unit.position for unit in find_units(toys.dit().build())] == [1, 2, 3]
    assert [unit.position for unit in find_units(toys.sd3().build())] == [0, 1, 2, 3]
    assert [unit.modules for unit in find_units(toys.hunyuan_dit().build())] == [
        ("blocks.1", "blocks.6"), ("blocks.2", "blocks.5"),
    ]  # fmt: skip


def test_blocks_of_deep_attentions_are_units_when_asked_for():
    with torch.device("meta"):
        network = toys.sdxl().model(**toys.sdxl().config)
    units = find_units(network, kind="depth")
    tied = [unit for unit in units if len(unit.modules) == 2]
    assert {unit.stack for unit in tied} == {"down_blocks.2.attentions.0.transformer_blocks"}
    assert all(unit.modules[1].startswith("mid_block.") for unit in tied)
    every = tuple(name for unit in units for name in unit.modules)
    removal = plan_removal(type(network).__name__, network.config, sizes_of(network), every)
    assert removal.config["transformer_layers_per_block"] == [1, 1, 1]
    with pytest.raises(UnsupportedError, match="kind 'depth'"):
        find_units(toys.dit().build(), kind="depth")


def test_where_one_number_counts_all_stages_strictly_all_lose_a_layer():
    network = toys.unet3d().build()
    assert [unit.name for unit in find_units(network, strict=True)] == ["layer 1 of every stage"]
    assert [unit.name for unit in find_units(network)] == [
        "down_blocks.0.1 + up_blocks.1.1", "down_blocks.1.1 + up_blocks.0.1", "mid_block",
    ]  # fmt: skip
    small = toys.unet3d(layers_per_block=1).build()
    with pytest.raises(UnsupportedError, match="strict-config"):
        find_units(small, strict=True)
