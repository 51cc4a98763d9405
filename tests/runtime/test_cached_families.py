"""Networks whose blocks no other test runs, of clips and of images. Lists of transformer blocks that no family file
tells are found by what is known of their blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

from dacc.cache.units import choose_unit
from dacc.core.cache_plan import BlockRange, UnetCut
from dacc.runtime.cache_units import stacks_of
from dacc.runtime.cached import CachedUnits

from .cache_plans import BODY, CUT, ENCODER

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")

TEXT, STEP = torch.ones(1, 6, 16).cumsum(1) / 6, torch.tensor([5])
HEADS: dict[str, Any] = {"num_attention_heads": 2, "in_channels": 4}


def wan() -> Any:
    sizes = {"attention_head_dim": 12, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "rope_max_seq_len": 32}
    model = diffusers.WanTransformer3DModel(**HEADS, out_channels=4, num_layers=4, cross_attn_norm=True, **sizes)
    return model, {"hidden_states": torch.randn(1, 4, 2, 8, 8), "timestep": STEP, "encoder_hidden_states": TEXT}


def wan_vace() -> Any:
    """With hints that count: a new network's are zeros."""
    sizes = {"attention_head_dim": 12, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "rope_max_seq_len": 32}
    layers = {"num_layers": 4, "vace_layers": [0, 1, 2], "vace_in_channels": 4, "cross_attn_norm": True}
    model = diffusers.WanVACETransformer3DModel(**HEADS, out_channels=4, **layers, **sizes)
    for block in model.vace_blocks:
        torch.nn.init.normal_(block.proj_out.weight)
    inputs = {"hidden_states": torch.randn(1, 4, 2, 8, 8), "timestep": STEP, "encoder_hidden_states": TEXT}
    return model, inputs | {"control_hidden_states": torch.randn(1, 4, 2, 8, 8)}


def ltx() -> Any:
    sizes = {"attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 16, "num_layers": 4}
    model = diffusers.LTXVideoTransformer3DModel(**HEADS, out_channels=4, **sizes)
    inputs = {"hidden_states": torch.randn(1, 16, 4), "timestep": STEP, "encoder_hidden_states": TEXT}
    mask = {"encoder_attention_mask": torch.ones(1, 6).bool()}
    return model, inputs | mask | {"num_frames": 1, "height": 4, "width": 4}


def cogvideox() -> Any:
    sizes = {"attention_head_dim": 16, "time_embed_dim": 16, "text_embed_dim": 16, "num_layers": 4, "patch_size": 2}
    frames = {"sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": 6}
    model = diffusers.CogVideoXTransformer3DModel(**HEADS, out_channels=4, **sizes, **frames)
    return model, {"hidden_states": torch.randn(1, 2, 4, 8, 8), "timestep": STEP, "encoder_hidden_states": TEXT}


def hunyuan_video() -> Any:
    layers = {"num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1, "patch_size": 1, "patch_size_t": 1}
    sizes = {"attention_head_dim": 10, "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4)}
    model = diffusers.HunyuanVideoTransformer3DModel(**HEADS, out_channels=4, **layers, **sizes)
    inputs = {"hidden_states": torch.randn(1, 4, 1, 8, 8), "timestep": STEP, "encoder_hidden_states": TEXT}
    more = {"encoder_attention_mask": torch.ones(1, 6), "pooled_projections": torch.randn(1, 8)}
    return model, inputs | more | {"guidance": torch.tensor([1000.0])}


def mochi() -> Any:
    sizes = {"attention_head_dim": 8, "pooled_projection_dim": 16, "text_embed_dim": 16, "time_embed_dim": 4}
    model = diffusers.MochiTransformer3DModel(**HEADS, num_layers=4, max_sequence_length=6, **sizes)
    inputs = {"hidden_states": torch.randn(1, 4, 2, 8, 8), "timestep": STEP, "encoder_hidden_states": TEXT}
    return model, inputs | {"encoder_attention_mask": torch.ones(1, 6).bool()}


def sana() -> Any:
    sizes = {"attention_head_dim": 8, "cross_attention_head_dim": 8, "cross_attention_dim": 16, "sample_size": 8}
    text = {"num_cross_attention_heads": 2, "caption_channels": 16, "mlp_ratio": 2.0}
    model = diffusers.SanaTransformer2DModel(**HEADS, out_channels=4, num_layers=4, **sizes, **text)
    return model, {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": STEP, "encoder_hidden_states": TEXT}


def hunyuan_dit() -> Any:
    """Blocks of the second half read what those of the first half gave."""
    sizes = {"attention_head_dim": 8, "hidden_size": 16, "patch_size": 2, "sample_size": 8, "num_layers": 4}
    text = {"cross_attention_dim": 16, "cross_attention_dim_t5": 16, "text_len": 6, "text_len_t5": 6}
    more = {"pooled_projection_dim": 16, "use_style_cond_and_image_meta_size": False}
    model = diffusers.HunyuanDiT2DModel(**HEADS, **sizes, **text, **more)
    inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": STEP.float(), "encoder_hidden_states": TEXT}
    inputs |= {"encoder_hidden_states_t5": TEXT, "text_embedding_mask": torch.ones(1, 6)}
    return model, inputs | {"text_embedding_mask_t5": torch.ones(1, 6)}


def pixart() -> Any:
    sizes = {"attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 16, "sample_size": 8}
    model = diffusers.PixArtTransformer2DModel(**HEADS, **sizes, num_layers=4, patch_size=2)
    added = {"resolution": None, "aspect_ratio": None}
    inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": STEP, "encoder_hidden_states": TEXT}
    return model, inputs | {"added_cond_kwargs": added}


def sd3() -> Any:
    sizes = {"attention_head_dim": 8, "joint_attention_dim": 16, "caption_projection_dim": 16, "sample_size": 8}
    more = {"pooled_projection_dim": 8, "pos_embed_max_size": 8, "num_layers": 4, "patch_size": 2}
    model = diffusers.SD3Transformer2DModel(**HEADS, out_channels=4, **sizes, **more)
    inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": STEP, "encoder_hidden_states": TEXT}
    return model, inputs | {"pooled_projections": torch.randn(1, 8)}


def lumina2() -> Any:
    """With lists that refine image and text before the one that counts."""
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "num_kv_heads": 2, "cap_feat_dim": 16, "sample_size": 8}
    more = {"num_layers": 4, "num_refiner_layers": 1, "axes_dim_rope": (4, 4, 4), "axes_lens": (32, 16, 16)}
    model = diffusers.Lumina2Transformer2DModel(in_channels=4, out_channels=4, patch_size=2, **sizes, **more)
    inputs = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": STEP.float(), "encoder_hidden_states": TEXT}
    return model, inputs | {"encoder_attention_mask": torch.ones(1, 6).bool()}


def flux2() -> Any:
    """Image and text become one stream behind the first list."""
    sizes = {"attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16, "in_channels": 16}
    more = {"axes_dims_rope": (2, 2, 2, 2), "guidance_embeds": False, "timestep_guidance_channels": 16}
    model = diffusers.Flux2Transformer2DModel(num_layers=1, num_single_layers=4, **sizes, **more)
    inputs = {"hidden_states": torch.randn(1, 16, 16), "timestep": STEP / 1000, "encoder_hidden_states": TEXT}
    return model, inputs | {"img_ids": torch.zeros(16, 4), "txt_ids": torch.zeros(6, 4)}


MAKERS = [wan, wan_vace, ltx, cogvideox, hunyuan_video, mochi, sana, hunyuan_dit, pixart, sd3, lumina2, flux2]


@pytest.mark.parametrize("make", MAKERS)
@torch.no_grad()
def test_blocks_in_the_middle_are_found_skipped_and_change_nothing_on_the_same_input(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model, inputs = make()
    model.eval()
    plain = model(**inputs)[0]
    unit = choose_unit(model, "auto")
    assert isinstance(unit, BlockRange)
    assert (unit.first, unit.end) == (1, 3)
    units, values = CachedUnits(model, [unit]), {}
    with units.recording(values):
        assert torch.equal(model(**inputs)[0], plain)  # all is computed: no bit changes
    ran: list[str] = []
    blocks = [f"{stack}.{number}" for stack in unit.stacks for number in range(len(getattr(model, stack)))]
    for name in blocks:
        # a skipped block gives what enters it, so what is watched lies inside
        inner = next(
            child for _, child in model.get_submodule(name).named_modules() if isinstance(child, torch.nn.Linear)
        )
        inner.register_forward_hook(lambda *_, name=name: ran.append(name) if name not in ran else None)
    with units.reusing(values, ["body"]):
        torch.testing.assert_close(model(**inputs)[0], plain, atol=1e-5, rtol=1e-4)
    assert ran == [blocks[0], blocks[-1]]
    other = {**inputs, "hidden_states": inputs["hidden_states"] + 1}
    fresh = model(**other)[0]
    with units.reusing(values, ["body"]):
        assert not torch.allclose(model(**other)[0], fresh, atol=1e-6)


def unet_3d() -> Any:
    blocks = {"down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D")}
    blocks |= {"up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")}
    sizes = {"block_out_channels": (16, 32), "norm_num_groups": 8, "cross_attention_dim": 16, "attention_head_dim": 4}
    model = diffusers.UNet3DConditionModel(**blocks, **sizes, layers_per_block=1, sample_size=8)
    return model, {"sample": torch.randn(1, 4, 2, 8, 8), "timestep": 5, "encoder_hidden_states": TEXT}


def unet_spatio_temporal() -> Any:
    blocks = {"down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal")}
    blocks |= {"up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")}
    sizes = {"block_out_channels": (32, 64), "num_attention_heads": 2, "cross_attention_dim": 16, "sample_size": 8}
    added = {"projection_class_embeddings_input_dim": 96, "addition_time_embed_dim": 32}
    model = diffusers.UNetSpatioTemporalConditionModel(**blocks, **sizes, **added, layers_per_block=1)
    inputs = {"sample": torch.randn(1, 2, 8, 8, 8), "timestep": 5.0, "encoder_hidden_states": TEXT[:, :1]}
    return model, inputs | {"added_time_ids": torch.ones(1, 3)}


UNETS = [CUT, UnetCut(id="deep", block=0, layer=1), UnetCut(id="deep", block=1, layer=0), ENCODER, BODY]


@pytest.mark.parametrize("make", [unet_3d, unet_spatio_temporal])
@pytest.mark.parametrize("unit", UNETS, ids=lambda unit: f"{unit.kind} {getattr(unit, 'block', '')}")
@torch.no_grad()
def test_unets_of_clips_are_cut_and_change_no_bit_on_the_same_input(make: Callable[[], Any], unit: Any) -> None:
    torch.manual_seed(0)
    model, inputs = make()
    model.eval()
    plain = model(**inputs)[0]
    units, values = CachedUnits(model, [unit]), {}
    with units.recording(values):
        assert torch.equal(model(**inputs)[0], plain)
    with units.reusing(values, [unit.id]):
        assert torch.equal(model(**inputs)[0], plain)
    other = {**inputs, "sample": inputs["sample"] + 1}
    fresh = model(**other)[0]
    with units.reusing(values, [unit.id]):
        reused = model(**other)[0]
    assert not torch.allclose(reused, fresh, atol=1e-6)
    if unit in (ENCODER, BODY):  # which leave nothing that looks at the sample
        assert torch.equal(reused, plain)
    units.remove_()
    assert torch.equal(model(**other)[0], fresh)


def test_where_the_order_of_several_lists_is_not_known_none_is_taken() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            model, _ = wan()
            self.second, self.first = model.blocks[:2], model.blocks[2:]

    assert stacks_of(Odd()) == ()
    assert stacks_of(torch.nn.Sequential(torch.nn.Linear(1, 1))) == ()
