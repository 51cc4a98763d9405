"""A denoiser without blocks computes what the whole one does with these blocks passing on what enters them."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from dacc.core.errors import ConfigError, UnsupportedError
from dacc.prune.remap import index_map, sources_of
from dacc.prune.remove import Removal, plan_removal
from dacc.runtime.passthrough import bypass_, skipping

from . import toys
from .toys import Toy


def removal_of(network: nn.Module, removed: list[str]) -> Removal:
    names = [name for name, _ in network.named_modules()]
    return plan_removal(type(network).__name__, network.config, names, removed)


def cut(network: nn.Module, removed: list[str]) -> tuple[nn.Module, Removal]:
    """The smaller network, its weights loaded strictly."""
    removal = removal_of(network, removed)
    small = type(network).from_config(removal.config).eval()
    bypass_(small, removal.identity)
    state = network.state_dict()
    sources = sources_of(list(state), removal.keep, removal.removed, removal.copies)
    small.load_state_dict({new: state[old] for new, old in sources.items()}, strict=True)
    return small, removal


def layers(down: str, up: str, place: int, mirrored: int, *lists: str) -> list[str]:
    return [f"{block}.{name}.{at}" for block, at in ((down, place), (up, mirrored)) for name in lists]


def pair(stage: int, stages: int, *lists: str, place: int = 1, mirrored: int = 1) -> list[str]:
    return layers(f"down_blocks.{stage}", f"up_blocks.{stages - 1 - stage}", place, mirrored, *lists)


def blocks(path: str, *places: int) -> list[str]:
    return [f"{path}.{place}" for place in places]


R, RA = ("resnets",), ("resnets", "attentions")
R3, RA3 = ("resnets", "temp_convs"), ("resnets", "attentions", "temp_convs", "temp_attentions")
RM, RAM = ("resnets", "motion_modules"), ("resnets", "attentions", "motion_modules")
THREE = {"layers_per_block": 3}
DEEP = "transformer_blocks"
CASES: dict[str, tuple[Toy, list[str], dict[str, Any]]] = {
    "unet: all stages": (toys.unet2d(), [*pair(0, 2, *RA), *pair(1, 2, *R)], {"layers_per_block": 1}),
    "unet: middle": (toys.unet2d(), ["mid_block"], {"mid_block_type": None}),
    "unet: one stage": (toys.unet2d(), pair(0, 2, *RA), {}),
    "condition: one stage": (toys.unet_condition(), pair(0, 2, *RA), {"layers_per_block": [1, 2]}),
    "condition: middle": (toys.unet_condition(), ["mid_block", *pair(1, 2, *R)], {"mid_block_type": None}),
    "condition: second of three": (toys.unet_condition(**THREE), pair(0, 2, *RA, mirrored=2), {}),
    "condition: third of three": (toys.unet_condition(**THREE), pair(0, 2, *RA, place=2), {}),
    "sdxl: like KOALA": (
        toys.sdxl(),
        [
            *pair(0, 3, *R), *pair(1, 3, *RA), *pair(2, 3, *RA),
            *(f"{at}.{DEEP}.{place}" for place in (1, 2) for at in
              ("down_blocks.2.attentions.0", "up_blocks.0.attentions.0", "up_blocks.0.attentions.2",
               "mid_block.attentions.0")),
        ],
        {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 2]},
    ),
    "sdxl: single blocks": (
        toys.sdxl(),
        [f"down_blocks.2.attentions.1.{DEEP}.2", f"up_blocks.1.attentions.0.{DEEP}.0", *pair(0, 3, *R)],
        {
            "transformer_layers_per_block": [1, 2, [4, 3]],
            "reverse_transformer_layers_per_block": [4, [1, 2, 2], 1],
        },
    ),
    "sdxl: depths told of the way up alone": (
        toys.sdxl(reverse_transformer_layers_per_block=([4, 2, 3], 2, 1)),
        pair(2, 3, *RA),
        {"transformer_layers_per_block": [1, 2, 4], "reverse_transformer_layers_per_block": [[4, 3], 2, 1]},
    ),
    "condition: innermost stage": (
        toys.unet_condition(**toys.WIDE, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D",
                            "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")),
        ["down_blocks.2", "down_blocks.1.downsamplers", "up_blocks.0", "mid_block", *pair(0, 3, *RA)],
        {"block_out_channels": [8, 16], "mid_block_type": None, "layers_per_block": [1, 2],
         "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]},
    ),
    "condition: one of two stages": (
        toys.unet_condition(block_out_channels=(8, 8), sample_size=(8, 8)),
        ["down_blocks.1", "down_blocks.0.downsamplers", "up_blocks.0", "mid_block"],
        {"block_out_channels": [8], "sample_size": (8, 8), "up_block_types": ["CrossAttnUpBlock2D"]},
    ),
    "spatio-temporal": (toys.spatio_temporal(), pair(0, 2, *RA), {"layers_per_block": [1, 2]}),
    "spatio-temporal: middle": (toys.spatio_temporal(), ["mid_block", *pair(1, 2, *R)], {"layers_per_block": [2, 1]}),
    "3d: all stages": (toys.unet3d(), [*pair(0, 2, *RA3), *pair(1, 2, *R3)], {"layers_per_block": 1}),
    "3d: one stage and the middle": (toys.unet3d(), ["mid_block", *pair(0, 2, *RA3)], {}),
    "motion": (toys.motion(), pair(0, 2, *RAM), {"layers_per_block": [1, 2]}),
    "motion: middle": (toys.motion(), ["mid_block", *pair(1, 2, *RM)], {"layers_per_block": [2, 1]}),
    "dit": (toys.dit(), blocks(DEEP, 1, 3), {"num_layers": 2}),
    "pixart": (toys.pixart(), blocks(DEEP, 0, 2), {"num_layers": 2}),
    "sd3": (toys.sd3(), blocks(DEEP, 1, 3), {"num_layers": 3, "dual_attention_layers": [0, 1]}),
    "flux": (
        toys.flux(), [*blocks(DEEP, 1), *blocks("single_transformer_blocks", 0, 3)],
        {"num_layers": 2, "num_single_layers": 2},
    ),
    "flux: no single blocks": (toys.flux(), blocks("single_transformer_blocks", 0, 1, 2, 3), {"num_single_layers": 0}),
    "flux2": (
        toys.flux2(), [*blocks(DEEP, 1), *blocks("single_transformer_blocks", 0, 3)],
        {"num_layers": 2, "num_single_layers": 2},
    ),
    "hunyuan video": (
        toys.hunyuan_video(), [*blocks(DEEP, 0), *blocks("single_transformer_blocks", 1)],
        {"num_layers": 2, "num_single_layers": 2},
    ),
    "hunyuan dit": (toys.hunyuan_dit(), blocks("blocks", 1, 6), {"num_layers": 6}),
    "wan": (toys.wan(), blocks("blocks", 1, 2), {"num_layers": 2}),
    "ltx": (toys.ltx(), blocks(DEEP, 0, 3), {"num_layers": 2}),
    "cogvideox": (toys.cogvideox(), blocks(DEEP, 1), {"num_layers": 3}),
    "qwen image": (toys.qwen_image(), blocks(DEEP, 1), {"num_layers": 3}),
    "sana": (toys.sana(), blocks(DEEP, 2), {"num_layers": 3}),
}  # fmt: skip
STAGE = "condition: innermost stage"
SMALLER = {STAGE, "condition: one of two stages"}  # the rest runs at another resolution: no identities would tell it


@pytest.mark.parametrize("name", CASES)
def test_what_is_left_computes_what_the_whole_does_with_identities(name):
    toy, removed, changed = CASES[name]
    network = toy.build()
    small, removal = cut(network, removed)
    assert {key: removal.config[key] for key in changed} == changed
    before = sum(parameter.numel() for parameter in network.parameters())
    assert sum(parameter.numel() for parameter in small.parameters()) < before
    found = toy.run(small)
    if name not in SMALLER:
        with skipping(network, removed):
            wanted = toy.run(network)
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
        assert (found - toy.run(network)).abs().max() > 1e-3  # else the test would see nothing
    assert bool(removal.identity) == (name in IDENTITIES)


IDENTITIES = {
    "unet: one stage",
    "spatio-temporal: middle",
    "3d: one stage and the middle",
    "motion: middle",
}


def test_the_innermost_stage_goes_with_the_sampler_that_leads_to_it():
    toy, removed, _ = CASES[STAGE]
    network = toy.build()
    small, removal = cut(network, removed)
    assert small.down_blocks[-1].downsamplers is None
    own = {name for name, _ in small.named_parameters()}
    assert own == set(sources_of([n for n, _ in network.named_parameters()], removal.keep, removal.removed, {}))
    assert torch.equal(small.up_blocks[0].resnets[0].conv1.weight, network.up_blocks[1].resnets[0].conv1.weight)


def test_a_first_block_of_dit_leaves_its_embedding_to_the_next():
    network = toys.dit().build()
    embedding = network.transformer_blocks[0].norm1.emb
    network.transformer_blocks[1].norm1.emb.load_state_dict(embedding.state_dict())  # as in published models
    small, _ = cut(network, blocks(DEEP, 0))
    with skipping(network, blocks(DEEP, 0)):
        wanted = toys.dit().run(network)
    assert (toys.dit().run(small) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    other = toys.dit().build()
    small, _ = cut(other, blocks(DEEP, 0))
    for new, old in zip(small.transformer_blocks[0].norm1.emb.parameters(), embedding.parameters(), strict=True):
        assert torch.equal(new, old)


REFUSED = {
    "the last of sd3": (toys.sd3(), blocks(DEEP, 4), "built in another way"),
    "one of a pair": (toys.hunyuan_dit(), blocks("blocks", 1), "cannot go alone"),
    "the first of a pair": (toys.hunyuan_dit(), blocks("blocks", 0), "blocks.0 cannot go alone"),
    "the middle of hunyuan": (toys.hunyuan_dit(), blocks("blocks", 3, 4), "cannot go alone"),
    "half a block": (toys.flux(), [f"{DEEP}.0.ff"], "no whole block"),
    "a layer without its mirror": (toys.unet_condition(), ["down_blocks.0.resnets.1"], "going up"),
    "the first layers": (toys.unet_condition(), pair(0, 2, *RA, place=0, mirrored=0), "number of channels"),
    "a resnet without its attention": (toys.unet_condition(), pair(0, 2, *R), "would stay"),
    "one attention": (toys.unet_condition(), ["down_blocks.0.attentions.0"], "removed alone"),
    "a stage that is wider": (toys.unet_condition(), ["down_blocks.1", "up_blocks.0", "mid_block"], "channels"),
    "the middle alone shorter": (toys.sdxl(), [f"mid_block.attentions.0.{DEEP}.1"], "one number for both"),
    "all of an attention": (toys.sdxl(), [f"down_blocks.1.attentions.0.{DEEP}.{k}" for k in (0, 1)], "keep none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_not_run_is_refused(name):
    toy, removed, told = REFUSED[name]
    with pytest.raises(UnsupportedError, match=told):
        removal_of(toy.build(), removed)


def test_strange_names_and_classes_are_refused():
    with pytest.raises(ConfigError, match="no module 'blocks.9'"):
        removal_of(toys.wan().build(), ["blocks.9"])
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    with pytest.raises(UnsupportedError, match="AutoencoderKL"):
        removal_of(vae, ["encoder.mid_block"])


def test_the_index_map_names_what_moved_and_only_that():
    network = toys.sdxl().build()
    removed = [*pair(2, 3, *RA), f"up_blocks.0.attentions.2.{DEEP}.0"]
    removal = removal_of(network, removed)
    names = [name for name, _ in network.named_modules()]
    assert index_map(names, removal.keep, removal.removed) == {
        "up_blocks.0.attentions.2": "up_blocks.0.attentions.1",
        f"up_blocks.0.attentions.2.{DEEP}.1": f"up_blocks.0.attentions.1.{DEEP}.0",
        f"up_blocks.0.attentions.2.{DEEP}.2": f"up_blocks.0.attentions.1.{DEEP}.1",
        f"up_blocks.0.attentions.2.{DEEP}.3": f"up_blocks.0.attentions.1.{DEEP}.2",
        "up_blocks.0.resnets.2": "up_blocks.0.resnets.1",
    }
