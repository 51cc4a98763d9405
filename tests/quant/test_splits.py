"""Layers that read two joined tensors: which they are, where the first ends, and what scales of its own bring."""

import diffusers
import pytest
import torch
from torch import nn

from dacc import PruneConfig, QuantizeConfig, load, prune_pipeline
from dacc.benchmarks.full_size_models import MODELS
from dacc.core.reporter import silent
from dacc.core.scheme import Scheme
from dacc.quant.grid import find_grid
from dacc.quant.preview import preview_quantization
from dacc.quant.ranges import Observed, scale_of
from dacc.quant.splits import find_splits
from dacc.runtime.activation import round_static
from dacc.runtime.passthrough import bypass_
from dacc.runtime.weight import QuantizedWeight

from ..prune import toys

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 inside diffusers

HALF = 128


def rounded(x, acts, split):
    """x (N, K) through its integers, each part of the channels with its own scale."""
    parts = x.split([split, x.shape[1] - split], dim=1) if split else [x]
    found = [
        round_static(part, acts.scale[0, number], acts.zero_point[0, number], 8) for number, part in enumerate(parts)
    ]
    return torch.cat(found, dim=1)


def output_error(x, weight, *, split, act_bits):
    """Mean squared error of x W^T at 4 bits, all ranges from minimum to maximum."""
    mode = {"act_bits": act_bits, "act_mode": "static"} if act_bits < 16 else {}
    scheme = Scheme(bits=4, split=split, **mode)
    entering = x
    if act_bits < 16:
        parts = x.split([split, x.shape[1] - split], dim=1) if split else [x]
        records = [[(0, Observed(part.flatten(), float(part.min()), float(part.max())))] for part in parts]
        entering = rounded(x, scale_of(scheme, records, "minmax"), split)
    return float((entering @ find_grid(weight, scheme, search=False).round(weight).T - x @ weight.T).square().mean())


def gain(x_ratio, weight_ratio, act_bits):
    """Error with the split, as a share of that without it."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.ones(2 * HALF)
    x = torch.randn(500, 2 * HALF, generator=generator) * torch.where(torch.arange(2 * HALF) < HALF, sizes, x_ratio)
    weight = torch.randn(64, 2 * HALF, generator=generator)
    weight = weight * torch.where(torch.arange(2 * HALF) < HALF, sizes, weight_ratio)
    return output_error(x, weight, split=HALF, act_bits=act_bits) / output_error(
        x, weight, split=None, act_bits=act_bits
    )


@pytest.mark.parametrize("act_bits", [16, 8])
def test_two_scales_save_a_layer_whose_inputs_and_weights_have_two_sizes(act_bits):
    assert gain(50, 1 / 50, act_bits) < 0.1


@pytest.mark.parametrize("act_bits", [16, 8])
def test_two_scales_bring_little_where_all_sizes_are_alike(act_bits):
    assert 0.75 < gain(1, 1, act_bits) <= 1.0


def test_of_the_weights_alone_two_scales_bring_little_where_only_inputs_have_two_sizes():
    assert 0.75 < gain(50, 1, 16) <= 1.0


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(bits=4, split=32),
        Scheme(bits=4, split=32, group_size=16, symmetric=False),
        Scheme(bits=4, split=32, group_size=16, two_level=True, act_bits=8, act_mode="static"),
    ],
    ids=lambda scheme: scheme.name,
)
@pytest.mark.parametrize("search", [False, True])
def test_the_grid_of_a_split_weight_is_those_of_its_parts(scheme, search):
    weight = torch.randn(6, 80, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0] * 32 + [0.1] * 48)
    whole = scheme.model_copy(update={"split": None})
    expected = [find_grid(part, whole, search=search).round(part) for part in weight.split([32, 48], dim=1)]
    grid = find_grid(weight, scheme, search=search)
    torch.testing.assert_close(grid.round(weight), torch.cat(expected, dim=1), rtol=1e-3, atol=0)
    packed = grid.pack(grid.nearest(weight), (6, 80))
    torch.testing.assert_close(packed.dequantize(), grid.round(weight), rtol=1e-6, atol=0)
    assert torch.equal(QuantizedWeight(scheme, (6, 80), **packed.tensors()).dequantize(), packed.dequantize())


# where the first part ends


def watched_splits(model, monkeypatch, *args, **kwargs):
    """Skip convolution -> channels of the first tensor of the join whose result entered its residual block."""
    joined, found, cat = {}, {}, torch.cat

    def watch(tensors, *rest, **named):
        result = cat(tensors, *rest, **named)
        joined[id(result)] = result, tensors[0].shape[1]
        return result

    def note(name):
        def keep(_, args, kwargs):
            found[f"{name}.conv_shortcut"] = joined[id([*args, *kwargs.values()][0])][1]

        return keep

    for name, module in model.named_modules():
        if name.startswith("up_blocks") and getattr(module, "conv_shortcut", None) is not None:
            module.register_forward_pre_hook(note(name), with_kwargs=True)
    monkeypatch.setattr(torch, "cat", watch)
    with torch.no_grad():
        model(*args, **kwargs)
    return found


SMALL = {"sample_size": 16, "norm_num_groups": 4, "layers_per_block": 2}
UNETS = {
    "plain": (
        diffusers.UNet2DModel,
        {
            **SMALL,
            "block_out_channels": (8, 16, 24),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8,
        },
        {},
    ),
    "no middle": (
        diffusers.UNet2DModel,
        {
            **SMALL,
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D"),
            "mid_block_type": None,
        },
        {},
    ),
    "text": (
        diffusers.UNet2DConditionModel,
        {
            **SMALL,
            "block_out_channels": (8, 16, 32),
            "layers_per_block": (1, 2, 1),
            "cross_attention_dim": 8,
            "attention_head_dim": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        },
        {"encoder_hidden_states": torch.zeros(1, 3, 8)},
    ),
}


@pytest.mark.parametrize("kind", UNETS)
def test_the_first_part_is_the_tensor_before_the_join(kind, monkeypatch):
    build, fields, kwargs = UNETS[kind]
    model = build(**fields)
    x = torch.randn(1, model.config.in_channels, 16, 16)
    expected = watched_splits(model, monkeypatch, x, 5, **kwargs)
    assert len(expected) == sum(len(block.resnets) for block in model.up_blocks)
    assert find_splits(model) == expected


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_first_part_is_right_at_real_sizes(name, monkeypatch):
    entry = MODELS[name]
    with torch.device("meta"):
        model = entry.build(entry.published_depth)
        inputs = entry.inputs(lambda *shape: torch.randn(1, *shape), (4, 16, 16))
        inputs["timestep"] = torch.zeros(1)
        expected = watched_splits(model, monkeypatch, **inputs)
    assert len(expected) == {"sd15": 12, "sdxl": 9}[name]
    assert find_splits(model) == expected


FAMILIES = {
    "UNet2DModel": toys.unet2d(),
    "UNet2DConditionModel": toys.unet_condition(),
    "UNet2DConditionModel of SDXL": toys.sdxl(),
    "UNet3DConditionModel": toys.unet3d(block_out_channels=(32, 64)),
    "UNetMotionModel": toys.motion(),
    "UNetSpatioTemporalConditionModel": toys.spatio_temporal(block_out_channels=(32, 64)),
}
REMOVED = {
    "nothing": [],
    "layers": ["down_blocks.1.resnets.1", "up_blocks.0.resnets.1"],
    "layers beside wider and narrower ones": ["mid_block.resnets.1", "up_blocks.0.resnets.2", "up_blocks.1.resnets.0"],
    "the middle": ["mid_block", "down_blocks.1.resnets.1"],
}


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("removed", REMOVED)
def test_the_first_part_is_right_in_every_family_and_behind_what_was_removed(kind, removed, monkeypatch):
    toy, names = FAMILIES[kind], REMOVED[removed]
    model = toy.build()
    bypass_(model, names)
    expected = watched_splits(model, monkeypatch, **toy.inputs())
    gone = sum(name.startswith("up_blocks") for name in names)
    assert len(expected) == sum(len(block.resnets) for block in model.up_blocks) - gone
    assert find_splits(model) == expected


def test_where_widths_are_not_told_nothing_is_split():
    with torch.device("meta"):
        model = diffusers.UNet1DModel(sample_size=64, block_out_channels=(8, 16, 16))
    bypass_(model, ["up_blocks.0.resnets.1"])
    assert find_splits(model) == {}


@pytest.fixture(scope="module")
def pruned_unet(tmp_path_factory):
    """A tiny pipeline of which two layers are gone, in whose places modules pass on what enters them."""
    folder, model = tmp_path_factory.mktemp("pruned"), toys.unet2d().build()
    diffusers.DDPMPipeline(model, diffusers.DDPMScheduler()).save_pretrained(folder / "whole")
    return prune_pipeline(
        folder / "whole", PruneConfig(method="random", ratio=0.05, seed=1), output=folder / "cut", device="cpu"
    )


@pytest.mark.parametrize("method", ["qdiffusion", "tfmq"])
def test_what_was_pruned_is_planned_with_its_splits(method, pruned_unet):
    splits = find_splits(load(pruned_unet, device="cpu").unet)
    assert 0 < len(splits) < 6
    preview = preview_quantization(
        pruned_unet, QuantizeConfig(method=method, act_bits=8, bits=8), reporter=silent()
    ).components["unet"]
    assert sum(count for scheme, count in preview.schemes.items() if "split" in scheme) == len(splits)


def test_in_flux_attention_comes_before_the_feed_forward_product(flux_pipeline):
    model = flux_pipeline().transformer
    width = model.config.attention_head_dim * model.config.num_attention_heads
    assert find_splits(model) == {"single_transformer_blocks.0.proj_out": width}


def test_models_without_joined_inputs_have_no_splits(dit_pipeline):
    assert find_splits(dit_pipeline().transformer) == {}
    assert find_splits(nn.Linear(3, 3)) == {}


def test_a_split_survives_saving_and_loading(unet_folder, quantize_watched):
    done = quantize_watched(unet_folder, "qdiffusion", bits=4, act_bits=8, settings={"iterations": 4})
    splits = find_splits(done.model)
    unet = load(done.bundle, device="cpu").unet
    kept = {name: unet.get_submodule(name).scheme.split for name in splits}
    assert any(kept.values())
    for name, split in kept.items():
        assert split in (None, splits[name])
        assert unet.get_submodule(name).act_scale.shape == (1, 2 if split else 1)
