"""A tiny random denoiser of every class whose blocks can be removed, with what enters it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Toy:
    """How one is made."""

    model: type
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]

    def build(self) -> nn.Module:
        """The same weights each time."""
        torch.manual_seed(0)
        network = self.model(**self.config).eval().requires_grad_(False)
        for parameter in network.parameters():
            parameter.normal_(std=0.15)  # also what would be zero at the start, as gates
        return network

    def run(self, network: nn.Module) -> Tensor:
        """Its output."""
        torch.manual_seed(1)
        with torch.no_grad():
            return network(**self.inputs(), return_dict=False)[0]


TIME = torch.tensor([500, 100])
UNET = {"block_out_channels": (8, 16), "norm_num_groups": 4, "sample_size": 8}
CROSS = {"attention_head_dim": 2, "cross_attention_dim": 16}
WIDE = {"block_out_channels": (8, 16, 16), "norm_num_groups": 4, "sample_size": 8}


def unet2d(**fields: Any) -> Toy:
    config = {
        "in_channels": 1, "out_channels": 1, "layers_per_block": 2, "attention_head_dim": 4,
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
    }  # fmt: skip
    return Toy(
        diffusers.UNet2DModel, UNET | config | fields, lambda: {"sample": torch.randn(2, 1, 8, 8), "timestep": TIME}
    )


def unet_condition(**fields: Any) -> Toy:
    config = {
        "layers_per_block": 2, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip

    def inputs() -> dict[str, Any]:
        return {"sample": torch.randn(2, 4, 8, 8), "timestep": TIME, "encoder_hidden_states": torch.randn(2, 5, 16)}

    return Toy(diffusers.UNet2DConditionModel, UNET | CROSS | config | fields, inputs)


def sdxl(**fields: Any) -> Toy:
    types = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return unet_condition(**WIDE, **types, transformer_layers_per_block=(1, 2, 4), **fields)


def spatio_temporal(**fields: Any) -> Toy:
    config = {
        "block_out_channels": (32, 32), "in_channels": 4, "cross_attention_dim": 16, "num_attention_heads": 2,
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24, "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    }  # fmt: skip

    def inputs() -> dict[str, Any]:
        return {
            "sample": torch.randn(1, 3, 4, 8, 8), "timestep": TIME[:1], "encoder_hidden_states": torch.randn(1, 1, 16),
            "added_time_ids": torch.ones(1, 3),
        }  # fmt: skip

    return Toy(diffusers.UNetSpatioTemporalConditionModel, config | fields, inputs)


def unet3d(**fields: Any) -> Toy:
    config = {
        "block_out_channels": (32, 32), "cross_attention_dim": 16, "attention_head_dim": 8, "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    }  # fmt: skip

    def inputs() -> dict[str, Any]:
        return {"sample": torch.randn(1, 4, 3, 8, 8), "timestep": 500, "encoder_hidden_states": torch.randn(1, 5, 16)}

    return Toy(diffusers.UNet3DConditionModel, config | fields, inputs)


def motion(**fields: Any) -> Toy:
    config = {
        "block_out_channels": (8, 16), "cross_attention_dim": 16, "num_attention_heads": 2, "layers_per_block": 2,
        "motion_num_attention_heads": 2, "norm_num_groups": 4, "motion_max_seq_length": 8,
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
        "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
    }  # fmt: skip

    def inputs() -> dict[str, Any]:
        return {"sample": torch.randn(1, 4, 3, 8, 8), "timestep": 500, "encoder_hidden_states": torch.randn(3, 5, 16)}

    return Toy(diffusers.UNetMotionModel, config | fields, inputs)


def dit(**fields: Any) -> Toy:
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 4, "sample_size": 8, "out_channels": 8,
              "num_embeds_ada_norm": 10}  # fmt: skip

    def inputs() -> dict[str, Any]:
        return {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": TIME, "class_labels": torch.tensor([1, 3])}

    return Toy(diffusers.DiTTransformer2DModel, config | fields, inputs)


def pixart() -> Toy:
    config = {
        "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 4, "sample_size": 8, "caption_channels": 16,
        "cross_attention_dim": 16, "use_additional_conditions": False,
    }  # fmt: skip

    def inputs() -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 8, 8), "timestep": TIME, "encoder_hidden_states": torch.randn(2, 5, 16),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }  # fmt: skip

    return Toy(diffusers.PixArtTransformer2DModel, config, inputs)


def sd3() -> Toy:
    config = {
        "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 5, "sample_size": 8, "in_channels": 4,
        "out_channels": 4, "joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 16,
        "dual_attention_layers": (0, 1, 2),
    }  # fmt: skip

    def inputs() -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 8, 8), "timestep": TIME, "encoder_hidden_states": torch.randn(2, 5, 16),
            "pooled_projections": torch.randn(2, 16),
        }  # fmt: skip

    return Toy(diffusers.SD3Transformer2DModel, config, inputs)


def flux(**fields: Any) -> Toy:
    config = {
        "in_channels": 16, "num_layers": 3, "num_single_layers": 4, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (2, 2, 4),
    }  # fmt: skip

    def inputs() -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 16, 16), "timestep": TIME / 1000,
            "encoder_hidden_states": torch.randn(2, 5, 16), "pooled_projections": torch.randn(2, 16),
            "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3),
        }  # fmt: skip

    return Toy(diffusers.FluxTransformer2DModel, config | fields, inputs)


def flux2() -> Toy:
    config = {
        "in_channels": 16, "num_layers": 3, "num_single_layers": 4, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": 16, "axes_dims_rope": (2, 2, 2, 2), "guidance_embeds": False,
        "timestep_guidance_channels": 16,
    }  # fmt: skip

    def inputs() -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 16, 16), "timestep": TIME / 1000,
            "encoder_hidden_states": torch.randn(2, 5, 16), "img_ids": torch.zeros(16, 4),
            "txt_ids": torch.zeros(5, 4),
        }  # fmt: skip

    return Toy(diffusers.Flux2Transformer2DModel, config, inputs)


def hunyuan_video() -> Toy:
    config = {
        "in_channels": 4, "out_channels": 4, "num_layers": 3, "num_single_layers": 3, "num_refiner_layers": 1,
        "attention_head_dim": 8, "num_attention_heads": 2, "text_embed_dim": 16, "pooled_projection_dim": 16,
        "rope_axes_dim": (2, 2, 4), "guidance_embeds": False,
    }  # fmt: skip

    def inputs() -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, 4, 3, 8, 8), "timestep": TIME[:1],
            "encoder_hidden_states": torch.randn(1, 5, 16), "encoder_attention_mask": torch.ones(1, 5),
            "pooled_projections": torch.randn(1, 16),
        }  # fmt: skip

    return Toy(diffusers.HunyuanVideoTransformer3DModel, config, inputs)


def hunyuan_dit(**fields: Any) -> Toy:
    config = {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "patch_size": 2, "sample_size": 8,
        "hidden_size": 16, "num_layers": 8, "cross_attention_dim": 16, "cross_attention_dim_t5": 16,
        "pooled_projection_dim": 16, "text_len": 3, "text_len_t5": 4, "use_style_cond_and_image_meta_size": False,
    }  # fmt: skip

    def inputs() -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 8, 8), "timestep": TIME.float(),
            "encoder_hidden_states": torch.randn(2, 3, 16),
            "text_embedding_mask": torch.ones(2, 3), "encoder_hidden_states_t5": torch.randn(2, 4, 16),
            "text_embedding_mask_t5": torch.ones(2, 4),
        }  # fmt: skip

    return Toy(diffusers.HunyuanDiT2DModel, config | fields, inputs)


def wan() -> Toy:
    config = {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
        "freq_dim": 16, "ffn_dim": 16, "num_layers": 4, "rope_max_seq_len": 32,
    }  # fmt: skip

    def inputs() -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, 4, 3, 8, 8), "timestep": TIME[:1],
            "encoder_hidden_states": torch.randn(1, 5, 16),
        }  # fmt: skip

    return Toy(diffusers.WanTransformer3DModel, config, inputs)


def ltx() -> Toy:
    config = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 4,
        "cross_attention_dim": 16, "caption_channels": 16,
    }  # fmt: skip

    def inputs() -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, 12, 4), "timestep": TIME[:1], "num_frames": 3, "height": 2, "width": 2,
            "encoder_hidden_states": torch.randn(1, 5, 16), "encoder_attention_mask": torch.ones(1, 5),
        }  # fmt: skip

    return Toy(diffusers.LTXVideoTransformer3DModel, config, inputs)


def cogvideox() -> Toy:
    config = {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
        "text_embed_dim": 16, "num_layers": 4, "sample_width": 8, "sample_height": 8, "sample_frames": 9,
        "max_text_seq_length": 5,
    }  # fmt: skip

    def inputs() -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, 3, 4, 8, 8), "timestep": TIME[:1],
            "encoder_hidden_states": torch.randn(1, 5, 16),
        }  # fmt: skip

    return Toy(diffusers.CogVideoXTransformer3DModel, config, inputs)


def qwen_image() -> Toy:
    config = {
        "in_channels": 16, "out_channels": 4, "num_layers": 4, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": 16, "axes_dims_rope": (2, 2, 4),
    }  # fmt: skip

    def inputs() -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, 16, 16), "timestep": TIME[:1] / 1000,
            "encoder_hidden_states": torch.randn(1, 5, 16), "encoder_hidden_states_mask": torch.ones(1, 5),
            "img_shapes": [[(1, 4, 4)]],
        }  # fmt: skip

    return Toy(diffusers.QwenImageTransformer2DModel, config, inputs)


def sana() -> Toy:
    config = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 4,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16,
        "caption_channels": 16, "mlp_ratio": 2.0, "sample_size": 8,
    }  # fmt: skip

    def inputs() -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, 4, 8, 8), "timestep": TIME[:1],
            "encoder_hidden_states": torch.randn(1, 5, 16),
        }  # fmt: skip

    return Toy(diffusers.SanaTransformer2DModel, config, inputs)
