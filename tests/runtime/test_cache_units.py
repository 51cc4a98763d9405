from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DModel

from dacc.core.cache_plan import UnetCut
from dacc.core.errors import ModelError, UnsupportedError
from dacc.runtime.cache_units import containers_of, layout_of, skips_per_group

from .cache_plans import BODY, CUT, ENCODER, OUTPUT, blocks, module


def cut(block: int, layer: int) -> UnetCut:
    return UnetCut(id=f"{block}.{layer}", block=block, layer=layer)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_skip_connections_are_numbered_in_groups_of_layers_plus_one(layers):
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=layers,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    assert skips_per_group(unet) == [layers + 1] * 2


def test_the_shallowest_cut_leaves_the_first_convolution_and_the_last_up_layer(unet_pipeline):
    unet = unet_pipeline().unet
    layout = layout_of(unet, CUT)
    kept = set(dict(unet.named_modules())) - {
        name
        for name in dict(unet.named_modules())
        if any(name == s or name.startswith(f"{s}.") for s in layout.skipped)
    }
    run = {name for name in kept if name.endswith(("conv_in", "conv_out", "resnets.0", "resnets.1"))}
    assert run == {"conv_in", "conv_out", "up_blocks.1.resnets.1"}
    assert layout.kept == {"up_blocks.1.resnets.0"}


def test_the_deepest_cut_of_a_block_keeps_what_enters_its_mirror(unet_pipeline):
    unet = unet_pipeline().unet
    assert layout_of(unet, cut(0, 1)).kept == {"up_blocks.0"}
    assert layout_of(unet, cut(1, 1)).skipped == ("mid_block",)


def test_a_body_is_all_that_a_unet_runs_but_the_time_and_what_is_last(unet_pipeline):
    unet = unet_pipeline().unet
    layout = layout_of(unet, BODY)
    assert set(layout.skipped) == {
        "conv_in",
        "down_blocks.0",
        "down_blocks.1",
        "mid_block",
        "up_blocks.0",
        "up_blocks.1",
    }
    rest = {name for name, _ in unet.named_children()} - {name.partition(".")[0] for name in layout.skipped}
    assert rest == {"time_proj", "time_embedding", "conv_norm_out", "conv_act", "conv_out"}
    assert layout.kept == {"up_blocks.1"}


def test_a_deeper_cut_lies_in_a_shallower_one(unet_pipeline):
    unet = unet_pipeline().unet
    cuts = [cut(0, 0), cut(0, 1), cut(1, 0), cut(1, 1)]
    containers = containers_of(layout_of(unet, unit) for unit in (*cuts, BODY, OUTPUT))
    assert [len(containers[unit.id]) for unit in (OUTPUT, BODY, *cuts)] == [0, 1, 2, 3, 4, 5]


def test_units_that_reach_across_each_other_or_are_the_same_are_refused(unet_pipeline, dit_pipeline):
    unet, transformer = unet_pipeline().unet, dit_pipeline().transformer
    with pytest.raises(UnsupportedError, match="overlap"):
        containers_of([layout_of(unet, CUT), layout_of(unet, ENCODER)])
    with pytest.raises(UnsupportedError, match="overlap"):
        containers_of([layout_of(unet, cut(0, 0)), layout_of(unet, CUT.model_copy(update={"id": "twin"}))])
    inner = layout_of(transformer, module("transformer_blocks.1.ff"))
    assert containers_of([inner, layout_of(transformer, blocks(1, 2))])["transformer_blocks.1.ff"] == {"body"}


def test_the_output_is_all_of_any_denoiser(unet_pipeline, dit_pipeline):
    for denoiser in (unet_pipeline().unet, dit_pipeline().transformer):
        layout = layout_of(denoiser, OUTPUT)
        assert [denoiser.get_submodule(name) for name in layout.skipped] == [denoiser]
        assert layout.kept == set(layout.skipped)


def test_what_a_model_does_not_have_is_refused_by_name(unet_pipeline, dit_pipeline):
    unet, transformer = unet_pipeline().unet, dit_pipeline().transformer
    for denoiser, unit, error, said in (
        (unet, cut(2, 0), ModelError, r"block 2; the blocks .* \[2, 2\]"),
        (unet, cut(0, 2), ModelError, "layer 2 of block 0"),
        (unet, module("nowhere"), ModelError, "'nowhere'"),
        (unet, blocks(0, 1), ModelError, "no list of blocks 'transformer_blocks'"),
        (transformer, blocks(0, 3), ModelError, "has 2 blocks"),
        (transformer, BODY, UnsupportedError, "no lists of down and up blocks"),
        (transformer, CUT, UnsupportedError, "no lists of down and up blocks"),
    ):
        with pytest.raises(error, match=said):
            layout_of(denoiser, unit)


def test_a_unet_of_other_blocks_is_refused():
    with torch.device("meta"):
        unet = UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("SkipDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "SkipUpBlock2D"),
        )
    with pytest.raises(UnsupportedError, match="SkipDownBlock2D, SkipUpBlock2D"):
        layout_of(unet, CUT)
