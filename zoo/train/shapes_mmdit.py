"""Train zoo/shapes-mmdit: a text-to-image flow-matching transformer with joint attention (FluxPipeline).

    python zoo/train/shapes_mmdit.py --threads 2

Method: Scaling Rectified Flow Transformers (2024, arXiv 2403.03206): straight paths from data to noise, times drawn
from a logit-normal, text and image tokens in one attention; the blocks are FLUX.1's. The autoencoder and the CLIP text
encoder are those of shapes-sd (trained here when they are not there yet); a T5 encoder joins them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from autoencoder import Latents
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from shapes_stages import (
    LATENT_CHANNELS,
    TEXT_LENGTH,
    TEXT_WIDTH,
    CaptionTable,
    encode_drawings,
    look_clip,
    look_t5,
    make_prompts,
    save_pipeline,
    seen_captions,
    tabulate,
    train_autoencoder,
    train_clip,
    train_t5,
)
from torch import Tensor, nn
from trainer import TrainConfig, parse_arguments, shared_fields, train

NAME = "shapes-mmdit"
LATENT_SIZE, PATCH = 8, 2


def make_transformer() -> FluxTransformer2DModel:
    """Four double and eight single blocks of width 128; every residual branch starts closed (adaLN-Zero)."""
    transformer = FluxTransformer2DModel(
        patch_size=1,  # the pipeline packs 2x2 latents into a token itself
        in_channels=LATENT_CHANNELS * PATCH**2,
        num_layers=4,
        num_single_layers=8,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for module in transformer.modules():
        if isinstance(module, AdaLayerNormZero | AdaLayerNormZeroSingle | AdaLayerNormContinuous):
            nn.init.zeros_(module.linear.weight)
    nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """So few tokens need no shift of the times."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0, use_dynamic_shifting=False)


def pack(latents: Tensor) -> Tensor:
    """(N, L, h, w) latents -> (N, h w / 4, 4 L) tokens, as FluxPipeline orders them."""
    count, channels, height, width = latents.shape
    return FluxPipeline._pack_latents(latents, count, channels, height, width)


def make_loss(latents: Latents, rows: Tensor, captions: CaptionTable, config: TrainConfig) -> Callable[..., Tensor]:
    """Squared error of the velocity, noise minus data."""
    half = LATENT_SIZE // PATCH
    places = FluxPipeline._prepare_latent_image_ids(1, half, half, config.device, torch.float32)
    no_places = torch.zeros(TEXT_LENGTH, 3, device=config.device)

    def loss_of(model: nn.Module, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(rows), (config.batch_size,), generator=generator)
        clean = pack(latents.draw(index, generator))
        states, pooled = captions.draw(rows[index], generator)
        noise = torch.randn(clean.shape, generator=generator)
        times = torch.randn(config.batch_size, generator=generator).sigmoid()
        noisy = torch.lerp(clean, noise, times[:, None, None])
        predicted = model(
            noisy.to(config.device),
            timestep=times.to(config.device),
            encoder_hidden_states=states.to(config.device),
            pooled_projections=pooled.to(config.device),
            img_ids=places,
            txt_ids=no_places,
        ).sample
        return (predicted.float() - (noise - clean).to(config.device)).square().mean()

    return loss_of


def main() -> None:
    arguments = parse_arguments(__doc__ or "", name=NAME, steps=4000, batch_size=128)
    shared = shared_fields(arguments)
    vae = train_autoencoder(shared)
    clip, tokenizer = train_clip(shared)
    t5, tokenizer_2 = train_t5(shared)
    latents, rows = encode_drawings(vae, arguments.seed)

    def look(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        return look_t5(t5, tokenizer_2, captions), look_clip(clip, tokenizer, captions)[1]

    def write(transformer: nn.Module, folder: Path) -> None:
        save_pipeline(
            FluxPipeline,
            folder,
            {"transformer": transformer, "vae": vae, "text_encoder": clip, "text_encoder_2": t5},
            make_prompts(),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            scheduler=make_scheduler(),
        )

    config = TrainConfig(
        name=NAME, steps=arguments.steps, batch_size=arguments.batch_size, learning_rate=1e-3, bf16=True, **shared
    )
    captions = tabulate(look, seen_captions())
    torch.manual_seed(arguments.seed)  # the same start whether the other stages were trained now or found finished
    average = train(
        make_transformer(),
        make_loss(latents, rows, captions, config),
        config,
        lambda model: write(model, arguments.work / "export" / NAME),
    )
    write(average, arguments.output)


if __name__ == "__main__":
    main()
