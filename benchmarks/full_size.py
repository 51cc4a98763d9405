"""Denoisers at the sizes that people run, with random weights: made from their published configs, nothing downloaded.

    python benchmarks/full_size.py list                          # class, parameters, bytes and work of each
    python benchmarks/full_size.py make pixart-xl -o FOLDER      # an ordinary pipeline folder for any dacc command

Size, speed and memory do not depend on what a network has learned; image quality does, and is not measured on these. A
model too deep for a small machine is made with fewer blocks of the full width unless --depth says otherwise. The MACs
are those of one row at the published resolution; what is made reads its inputs at any resolution. On a folder, give
`dacc quantize` the option --measure never, or it runs the whole pipeline to compare noise with noise.

Other benchmarks import the factories as `from dacc.benchmarks.full_size import example_inputs, make_denoiser`: the
repository root is the package `dacc`, so this works from every folder and under PYTHONSAFEPATH=1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dacc.benchmarks import small_parts
from dacc.runtime.load import DTYPES
from dacc.runtime.macs import count_macs

Shape = tuple[int, ...]
Draw = Callable[..., Tensor]  # sizes after the batch -> normal values
LATENTS_PER_TOKEN = 4  # every transformer here folds 2 x 2 latents into one token


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


def make_denoiser(
    name: str, *, depth: int | None = None, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> nn.Module:
    """A denoiser with seeded random weights, as `from_pretrained(..., dtype=dtype)` would give it.

    Every weight is drawn in its final dtype, so memory holds little more than the model.
    """
    with init_empty_weights():  # parameters only: position embeddings and rotation tables are computed as always
        model = MODELS[name].build(depth)
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for path, tensor in model.state_dict().items():
        target = _stored_dtype(model, path, dtype)
        values[path] = _random(path, tensor.shape, target, generator) if tensor.is_meta else tensor.to(target)
    model.load_state_dict(values, assign=True)
    return model


def example_inputs(
    name: str,
    *,
    batch_size: int = 1,
    resolution: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of one call of the denoiser.

    Args:
        batch_size: rows of the call; a pipeline with guidance makes two for each image.
        resolution: one of the model's `resolutions`; default the published one.
    """
    entry = MODELS[name]
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch_size, *shape, generator=generator).to(dtype)

    latent = entry.resolutions[resolution or next(iter(entry.resolutions))]
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), entry.inputs(draw, latent))


def make_pipeline_folder(
    name: str, folder: str | Path, *, depth: int | None = None, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Path:
    """An ordinary pipeline folder: the denoiser at full size in `dtype`, everything around it tiny and random too."""
    entry, folder = MODELS[name], Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = entry.parts()
    role = "transformer" if entry.is_transformer else "unet"
    pipe = entry.pipeline(**{role: make_denoiser(name, depth=depth, dtype=dtype, seed=seed)}, **parts)
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def _stored_dtype(model: nn.Module, path: str, dtype: torch.dtype) -> torch.dtype:
    """Some classes keep a few layers in float32, whatever dtype they are loaded in."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return torch.float32 if kept & set(path.split(".")) else dtype


def _random(path: str, shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal values by fan-in, so that activations stay of order 1. Vectors are norms and biases: ones and zeros."""
    values = torch.empty(shape, dtype=dtype)
    if len(shape) == 1:
        return values.fill_(float(path.endswith("weight")))
    return values.normal_(std=prod(shape[1:]) ** -0.5, generator=generator)


# ---- what enters a denoiser -----------------------------------------------------------------------------------------


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


def table() -> Iterator[str]:
    """Rows of markdown: every model as published, and as made where that is less deep. Nothing is materialised."""
    yield "| name | class | depth | parameters | GB in bfloat16 | latents | tokens | TMAC per call |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, entry in MODELS.items():
        latent = next(iter(entry.resolutions.values()))
        tokens = prod(latent[1:]) // LATENTS_PER_TOKEN if entry.is_transformer else "-"
        inputs = example_inputs(name, device="meta")
        for depth in dict.fromkeys((entry.published_depth, entry.depth)):
            with torch.device("meta"):
                model = entry.build(depth)
            parameters = sum(parameter.numel() for parameter in model.parameters())
            size = sum(
                tensor.numel() * _stored_dtype(model, path, torch.bfloat16).itemsize
                for path, tensor in model.state_dict().items()
            )
            macs = count_macs(lambda model=model, inputs=inputs: model.bfloat16()(**inputs))
            yield (
                f"| {name} | {entry.model.__name__} | {depth} | {parameters / 1e6:.1f} M | {size / 1e9:.2f} "
                f"| {' x '.join(map(str, latent))} | {tokens} | {macs / 1e12:.2f} |"
            )


def main() -> None:
    """List the models, or make one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="every model: class, parameters, bytes, work per call of one row")
    make = commands.add_parser("make", help="write a pipeline folder")
    make.add_argument("name", choices=MODELS)
    make.add_argument("-o", "--output", type=Path, required=True, help="the folder to make")
    make.add_argument("--depth", type=int, help="; ".join(f"{name}: {entry.note}" for name, entry in MODELS.items()))
    make.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    make.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.command == "list":
        for row in table():
            print(row, flush=True)
        return
    if options.output.exists():
        parser.error(f"{options.output} exists already")
    print(
        make_pipeline_folder(
            options.name, options.output, depth=options.depth, dtype=DTYPES[options.dtype], seed=options.seed
        )
    )


if __name__ == "__main__":
    main()
