"""The published configs of denoisers that people run, and what enters each: the data behind full_size.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from dacc.benchmarks import small_parts

Shape = tuple[int, ...]
Draw = Callable[..., Tensor]  # sizes after the batch -> normal values


@dataclass(frozen=True)
class FullSize:
    """A published denoiser without its weights.

    Args:
        published: the model whose config this is.
        model: class of the denoiser.
        config: its arguments, where they differ from the class's defaults.
        pipeline: class of the pipeline.
        parts: makes the rest of the pipeline.
        resolutions: pixels (and frames) -> latent shape (C, H, W) or (C, F, H, W); the published one first.
        inputs: arguments of one call.
        published_depth: depth of the published model.
        depth: the depth that is made unless another is asked for.
        shallow: what a depth means in the config.
        note: the same in words.
    """

    published: str
    model: type[nn.Module]
    config: dict[str, Any]
    pipeline: type[diffusers.DiffusionPipeline]
    parts: Callable[[], dict[str, Any]]
    resolutions: dict[str, Shape]
    inputs: Callable[[Draw, Shape], dict[str, Any]]
    published_depth: int
    depth: int
    shallow: Callable[[int], dict[str, Any]] = lambda depth: {"num_layers": depth}
    note: str = "transformer blocks"

    def build(self, depth: int | None = None) -> nn.Module:
        """The denoiser, wherever and however the caller's context puts parameters."""
        depth = self.depth if depth is None else depth
        return self.model(**self.config | self.shallow(depth)).eval().requires_grad_(False)

    @property
    def is_transformer(self) -> bool:
        """Otherwise a UNet."""
        return "Transformer" in self.model.__name__


def _middle(sample: Tensor) -> Tensor:
    """One timestep per row, in the middle of the noise schedule."""
    return torch.full((len(sample),), 500)


def _dit_inputs(draw: Draw, latent: Shape) -> dict[str, Any]:
    sample = draw(*latent)
    return {"hidden_states": sample, "timestep": _middle(sample), "class_labels": torch.arange(len(sample))}


def _sd15_inputs(draw: Draw, latent: Shape) -> dict[str, Any]:
    sample = draw(*latent)
    return {"sample": sample, "timestep": _middle(sample), "encoder_hidden_states": draw(77, 768)}


def _sdxl_inputs(draw: Draw, latent: Shape) -> dict[str, Any]:
    sample, pooled = draw(*latent), draw(1280)
    height, width = (8 * side for side in latent[1:])
    sizes = pooled.new_tensor([height, width, 0, 0, height, width]).expand(len(sample), -1)  # original, crop, target
    return {
        "sample": sample,
        "timestep": _middle(sample),
        "encoder_hidden_states": draw(77, 2048),
        "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes},
    }


def _pixart_inputs(draw: Draw, latent: Shape) -> dict[str, Any]:
    sample = draw(*latent)
    return {
        "hidden_states": sample,
        "timestep": _middle(sample),
        "encoder_hidden_states": draw(300, 4096),
        "encoder_attention_mask": sample.new_ones(len(sample), 300),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _sd3_inputs(draw: Draw, latent: Shape) -> dict[str, Any]:
    sample = draw(*latent)
    return {
        "hidden_states": sample,
        "timestep": _middle(sample),
        "encoder_hidden_states": draw(77 + 256, 4096),  # CLIP tokens, then T5 tokens
        "pooled_projections": draw(2048),
    }


def _flux_inputs(draw: Draw, latent: Shape) -> dict[str, Any]:
    channels, height, width = latent
    rows, columns = height // 2, width // 2
    sample = draw(rows * columns, 4 * channels)
    places = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns))  # (tokens, 3)
    return {
        "hidden_states": sample,
        "timestep": _middle(sample).to(sample.dtype) / 1000,
        "guidance": torch.full((len(sample),), 3.5),
        "encoder_hidden_states": draw(512, 4096),
        "pooled_projections": draw(768),
        "img_ids": places.to(sample.dtype),
        "txt_ids": sample.new_zeros(512, 3),
    }


def _wan_inputs(draw: Draw, latent: Shape) -> dict[str, Any]:
    sample = draw(*latent)
    return {"hidden_states": sample, "timestep": _middle(sample), "encoder_hidden_states": draw(512, 4096)}


def _square(channels: int, *pixels: int) -> dict[str, Shape]:
    return {str(side): (channels, side // 8, side // 8) for side in pixels}


# ---- the models -----------------------------------------------------------------------------------------------------

MODELS = {
    "dit-xl": FullSize(
        published="facebook/DiT-XL-2-256",
        model=diffusers.DiTTransformer2DModel,
        config={"out_channels": 8, "sample_size": 32},
        pipeline=diffusers.DiTPipeline,
        parts=small_parts.dit,
        resolutions=_square(4, 256),
        inputs=_dit_inputs,
        published_depth=28,
        depth=28,
    ),
    "sd15": FullSize(
        published="stable-diffusion-v1-5/stable-diffusion-v1-5",
        model=diffusers.UNet2DConditionModel,
        config={"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        pipeline=diffusers.StableDiffusionPipeline,
        parts=small_parts.sd15,
        resolutions=_square(4, 512, 256),
        inputs=_sd15_inputs,
        published_depth=2,
        depth=2,
        shallow=lambda depth: {"layers_per_block": depth},
        note="resnets (each with its transformer block) per level",
    ),
    "sdxl": FullSize(
        published="stabilityai/stable-diffusion-xl-base-1.0",
        model=diffusers.UNet2DConditionModel,
        config={
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        pipeline=diffusers.StableDiffusionXLPipeline,
        parts=small_parts.sdxl,
        resolutions=_square(4, 1024, 512),
        inputs=_sdxl_inputs,
        published_depth=10,
        depth=10,
        shallow=lambda depth: {
            "layers_per_block": min(2, depth),
            "transformer_layers_per_block": tuple(min(blocks, depth) for blocks in (1, 2, 10)),
        },
        note="at most so many transformer blocks and resnets in a row",
    ),
    "pixart-xl": FullSize(
        published="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        model=diffusers.PixArtTransformer2DModel,
        config={
            "sample_size": 128,
            "interpolation_scale": 2,
            "caption_channels": 4096,
            "use_additional_conditions": False,
        },
        pipeline=diffusers.PixArtSigmaPipeline,
        parts=small_parts.pixart,
        resolutions=_square(4, 1024, 512, 256),
        inputs=_pixart_inputs,
        published_depth=28,
        depth=28,
    ),
    "sd35-medium": FullSize(
        published="stabilityai/stable-diffusion-3.5-medium",
        model=diffusers.SD3Transformer2DModel,
        config={
            "num_attention_heads": 24,
            "attention_head_dim": 64,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
        },
        pipeline=diffusers.StableDiffusion3Pipeline,
        parts=small_parts.sd3,
        resolutions=_square(16, 1024, 512),
        inputs=_sd3_inputs,
        published_depth=24,
        depth=24,
        shallow=lambda depth: {"num_layers": depth, "dual_attention_layers": tuple(range(-(-13 * depth // 24)))},
        note="transformer blocks; the first 13 of 24 attend twice, the same share of fewer",
    ),
    "flux": FullSize(
        published="black-forest-labs/FLUX.1-dev",
        model=diffusers.FluxTransformer2DModel,
        config={"guidance_embeds": True},
        pipeline=diffusers.FluxPipeline,
        parts=small_parts.flux,
        resolutions=_square(16, 1024, 512),
        inputs=_flux_inputs,
        published_depth=19,
        depth=2,
        shallow=lambda depth: {"num_layers": depth, "num_single_layers": 2 * depth},
        note="double blocks, and twice as many single ones",
    ),
    "wan-1.3b": FullSize(
        published="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        model=diffusers.WanTransformer3DModel,
        config={"num_attention_heads": 12, "ffn_dim": 8960},
        pipeline=diffusers.WanPipeline,
        parts=small_parts.wan,
        resolutions={"832x480, 81 frames": (16, 21, 60, 104), "832x480, 1 frame": (16, 1, 60, 104)},
        inputs=_wan_inputs,
        published_depth=30,
        depth=4,
    ),
}
