"""Sample a zoo pipeline as its entry in zoo/index.json says, and count what one call of its denoiser costs.

Letters: N samples, F frames of a clip, C channels, S pixels a side.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

BATCH_SIZE = 50
Asked = list[int] | list[str] | None  # class labels, prompts, or nothing: one per sample


def draw_samples(pipeline: DiffusionPipeline, entry: dict[str, Any], asked: Asked, count: int, seed: int) -> Tensor:
    """Images (N, C, S, S) or clips (N, F, C, S, S) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for start in range(0, count, BATCH_SIZE):
        size = min(BATCH_SIZE, count - start)
        batch = asked[start : start + size] if asked is not None else None
        output = pipeline(
            **call_arguments(pipeline, entry, batch, size, entry.get("guidance_scale")),
            num_inference_steps=entry["num_inference_steps"],
            generator=generator,
            output_type="np",
        )
        made = output.frames if "num_frames" in entry else output.images  # the channels last
        images.append(torch.from_numpy(made).movedim(-1, -3) * 2 - 1)
    return torch.cat(images)


def call_arguments(
    pipeline: DiffusionPipeline, entry: dict[str, Any], asked: Asked, size: int, guidance: float | None
) -> dict[str, Any]:
    """What the pipeline class wants to be told; it differs for every kind."""
    if entry["conditioning"] == "none":
        return {"batch_size": size}
    if entry["conditioning"] == "class":
        return {"class_labels": asked, "guidance_scale": guidance}
    if entry["pipeline"] == "FluxPipeline":
        return {
            "prompt": asked,
            "negative_prompt": [""] * size,
            "true_cfg_scale": guidance,
            "max_sequence_length": pipeline.tokenizer_2.model_max_length,
            "height": entry["height"],
            "width": entry["width"],
        }
    clip = {"num_frames": entry["num_frames"]} if "num_frames" in entry else {}
    return {"prompt": asked, "guidance_scale": guidance, **clip}


def denoiser_of(pipeline: DiffusionPipeline) -> nn.Module:
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


@torch.no_grad()
def count_macs(pipeline: DiffusionPipeline, entry: dict[str, Any], asked: Asked) -> int:
    """Multiply-accumulates of one denoiser call on one image, without guidance."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    denoiser = denoiser_of(pipeline)
    keep = denoiser.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    one = asked[:1] if asked is not None else None
    pipeline(**call_arguments(pipeline, entry, one, 1, 1.0), num_inference_steps=2, output_type="np")
    keep.remove()
    args, kwargs = calls[0]
    with FlopCounterMode(display=False) as counter:
        denoiser(*args, **kwargs)
    return counter.get_total_flops() // 2
