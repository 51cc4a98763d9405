"""Train zoo/shapes-sd: a text-to-image latent UNet with cross-attention (StableDiffusionPipeline).

    python zoo/train/shapes_sd.py --threads 2

Method: High-Resolution Image Synthesis with Latent Diffusion Models (2021, arXiv 2112.10752), with v-prediction
(2022, arXiv 2202.00512) and classifier-free guidance (2022, arXiv 2207.12598). Three stages: the autoencoder, the text
encoder, then the UNet on latents and text states that are made once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from autoencoder import Latents
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from digits_unet import draw_timesteps
from shapes_stages import (
    LATENT_CHANNELS,
    TEXT_WIDTH,
    CaptionTable,
    encode_drawings,
    look_clip,
    make_prompts,
    save_pipeline,
    seen_captions,
    tabulate,
    train_autoencoder,
    train_clip,
)
from torch import Tensor, nn
from trainer import TrainConfig, parse_arguments, shared_fields, train

NAME = "shapes-sd"


def make_unet() -> UNet2DConditionModel:
    """Two stages, 8x8 and 4x4 latents, both with cross-attention."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # the number of heads, whatever the name says
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    """The linear schedule ends in all but pure noise, which a white background needs; spacing as in digits_unet."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )


def make_loss(latents: Latents, rows: Tensor, captions: CaptionTable, config: TrainConfig) -> Callable[..., Tensor]:
    """Squared error of the velocity: the noisy steps, which settle the layout, weigh as much as the others."""
    scheduler = make_scheduler()

    def loss_of(model: nn.Module, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(rows), (config.batch_size,), generator=generator)
        clean = latents.draw(index, generator)
        states, _ = captions.draw(rows[index], generator)
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = draw_timesteps(config.batch_size, generator)
        noisy = scheduler.add_noise(clean, noise, timesteps).to(config.device)
        wanted = scheduler.get_velocity(clean, noise, timesteps).to(config.device)
        predicted = model(noisy, timesteps.to(config.device), encoder_hidden_states=states.to(config.device)).sample
        return (predicted.float() - wanted).square().mean()

    return loss_of


def main() -> None:
    arguments = parse_arguments(__doc__ or "", name=NAME, steps=3500, batch_size=96)
    shared = shared_fields(arguments)
    vae = train_autoencoder(shared)
    clip, tokenizer = train_clip(shared)
    latents, rows = encode_drawings(vae, arguments.seed)

    def write(unet: nn.Module, folder: Path) -> None:
        save_pipeline(
            StableDiffusionPipeline,
            folder,
            {"unet": unet, "vae": vae, "text_encoder": clip},
            make_prompts(),
            tokenizer=tokenizer,
            scheduler=make_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    captions = tabulate(lambda texts: look_clip(clip, tokenizer, texts), seen_captions())
    config = TrainConfig(
        name=NAME, steps=arguments.steps, batch_size=arguments.batch_size, learning_rate=7e-4, **shared
    )
    torch.manual_seed(arguments.seed)  # the same start whether the other stages were trained now or found finished
    average = train(
        make_unet(),
        make_loss(latents, rows, captions, config),
        config,
        lambda model: write(model, arguments.work / "export" / NAME),
    )
    write(average, arguments.output)


if __name__ == "__main__":
    main()
