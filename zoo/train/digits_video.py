"""Train zoo/digits-video: a text-to-video latent UNet with motion modules (AnimateDiffPipeline).

    python zoo/train/digits_video.py --threads 2

Method: AnimateDiff (2023, arXiv 2307.04725): an image UNet learns single frames first; motion modules that begin as
the identity are then put behind its layers. Here all of it goes on learning on clips. With v-prediction (2022, arXiv
2202.00512) and classifier-free guidance (2022, arXiv 2207.12598). Five stages: autoencoder, text encoder, frames,
clips, and clips again after the motion modules were shown the order of frames, which they had not found by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from autoencoder import Latents
from clips import FRAME_SIZE, all_captions, make_prompts
from data import load_digits
from diffusers import AnimateDiffPipeline, UNet2DConditionModel, UNetMotionModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from digits_unet import draw_timesteps
from digits_video_stages import LATENT_CHANNELS, TEXT_WIDTH, encode_clips, train_autoencoder, train_clip
from shapes_sd import make_scheduler
from shapes_stages import CaptionTable, look_clip, save_pipeline, tabulate
from torch import Tensor, nn
from trainer import TrainConfig, parse_arguments, shared_fields, train

NAME = "digits-video"
FRAME_STEPS, FRAME_BATCH = 1400, 64
HEADS = 2
POSITION_FEATURES, GAIN = 8, 3.0  # the fastest sines and cosines of a position; larger: attention nearer to one frame
SHAPE: dict[str, Any] = {
    "sample_size": FRAME_SIZE // 4,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "block_out_channels": (32, 48, 64),
    "layers_per_block": (2, 2, 2),
    "norm_num_groups": 16,
    "cross_attention_dim": TEXT_WIDTH,
}
Batch = tuple[Tensor, Tensor]  # clean latents (B, ...) and text states (B, T, D)


def make_unet() -> UNet2DConditionModel:
    """Three stages, 8x8, 4x4 and 2x2 latents; the two deeper ones and the middle read the caption."""
    return UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=HEADS,  # the number of heads, whatever the name says
        **SHAPE,
    )


def add_motion(unet: nn.Module) -> UNetMotionModel:
    """The same network with a motion module behind every layer; those add nothing yet."""
    model = UNetMotionModel(
        down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion"),
        up_block_types=("CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion", "UpBlockMotion"),
        num_attention_heads=HEADS,
        motion_num_attention_heads=HEADS,
        motion_max_seq_length=32,
        **SHAPE,
    )
    for module in model.modules():
        if isinstance(module, AnimateDiffTransformer3D):
            nn.init.zeros_(module.proj_out.weight)
            nn.init.zeros_(module.proj_out.bias)
    missing, unexpected = model.load_state_dict(unet.state_dict(), strict=False)
    assert not unexpected
    assert all(".motion_modules." in name for name in missing)
    return model


def make_loss(
    draw: Callable[[torch.Generator], Batch], config: TrainConfig, *, noisier: bool = False
) -> Callable[..., Tensor]:
    """Squared error of the velocity: the noisy steps, which settle place and motion, weigh as much as the others.

    Args:
        noisier: draw timestep t in proportion to t, for more of these steps.
    """
    scheduler = make_scheduler()

    def loss_of(model: nn.Module, generator: torch.Generator) -> Tensor:
        clean, states = draw(generator)
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = draw_timesteps(len(clean), generator)
        if noisier:
            timesteps = (timesteps / 1000).sqrt().mul(1000).long()
        noisy = scheduler.add_noise(clean, noise, timesteps).to(config.device)
        wanted = scheduler.get_velocity(clean, noise, timesteps).to(config.device)
        predicted = model(noisy, timesteps.to(config.device), encoder_hidden_states=states.to(config.device)).sample
        return (predicted.float() - wanted).square().mean()

    return loss_of


def train_frames(latents: Latents, rows: Tensor, captions: CaptionTable, shared: dict[str, Any]) -> nn.Module:
    """The image UNet on single frames, each with the caption of its clip."""
    config = TrainConfig(
        name="digits-video-frames",
        steps=FRAME_STEPS,
        batch_size=FRAME_BATCH,
        learning_rate=1e-3,
        decay_fraction=0.2,
        **shared,
    )
    frames = latents.means.shape[1]
    flat = Latents(latents.means.flatten(0, 1), latents.deviations.flatten(0, 1))

    def draw(generator: torch.Generator) -> Batch:
        index = torch.randint(len(flat.means), (config.batch_size,), generator=generator)
        return flat.draw(index, generator), captions.draw(rows[index // frames], generator)[0]

    torch.manual_seed(config.seed)  # the same start whether the other stages were trained now or found finished
    return train(make_unet(), make_loss(draw, config), config, lambda model: None)


def train_clips(
    unet: nn.Module, latents: Latents, rows: Tensor, captions: CaptionTable, shared: dict[str, Any]
) -> nn.Module:
    """The whole network on clips: their frames come to show one digit on one line."""
    config = TrainConfig(
        name="digits-video-clips",
        steps=1850,
        stop_step=1300,
        batch_size=8,
        learning_rate=7e-4,
        checkpoint_every=100,
        **shared,
    )
    draw = partial(_draw_clips, latents, rows, captions, config.batch_size)
    torch.manual_seed(config.seed)
    return train(add_motion(unet), make_loss(draw, config), config, lambda model: None)


@torch.no_grad()
def show_order_(model: nn.Module) -> None:
    """Let the first attention of every motion module look at its own frame, by the position embeddings alone.

    Attention that is about even over the frames gives all of them the same mixture of positions: nothing says which
    frame is the first, and gradients hardly lead out of there. A frame that sees itself sees its own position.
    """
    for module in model.modules():
        if not isinstance(module, AnimateDiffTransformer3D):
            continue
        for block in module.transformer_blocks:
            attention = block.attn1
            width = attention.to_q.weight.shape[0] // attention.heads
            look = torch.zeros_like(attention.to_q.weight).unflatten(0, (attention.heads, width))  # (heads, width, D)
            look[:, :POSITION_FEATURES, :POSITION_FEATURES] = GAIN * torch.eye(POSITION_FEATURES)
            attention.to_q.weight.copy_(look.flatten(0, 1))
            attention.to_k.weight.copy_(look.flatten(0, 1))


def train_order(
    unet: nn.Module,
    latents: Latents,
    rows: Tensor,
    captions: CaptionTable,
    config: TrainConfig,
    export: Callable[[nn.Module], None],
) -> nn.Module:
    """Clips again, after `show_order_`: the frames learn to follow each other as the caption says."""
    show_order_(unet)
    draw = partial(_draw_clips, latents, rows, captions, config.batch_size)
    torch.manual_seed(config.seed)
    return train(unet.requires_grad_(True), make_loss(draw, config, noisier=True), config, export)


def _draw_clips(
    latents: Latents, rows: Tensor, captions: CaptionTable, count: int, generator: torch.Generator
) -> Batch:
    index = torch.randint(len(rows), (count,), generator=generator)
    states, _ = captions.draw(rows[index], generator)
    clean = latents.draw(index, generator).transpose(1, 2)  # (B, L, F, h, w)
    return clean, states.repeat_interleave(clean.shape[2], dim=0)


def main() -> None:
    arguments = parse_arguments(__doc__ or "", name=NAME, steps=1200, batch_size=8)
    shared = shared_fields(arguments)
    digits = load_digits()
    vae = train_autoencoder(digits, shared)
    clip, tokenizer = train_clip(shared)
    latents, rows = encode_clips(vae, digits, arguments.seed)
    captions = tabulate(lambda texts: look_clip(clip, tokenizer, texts), all_captions())

    def write(unet: nn.Module, folder: Path) -> None:
        save_pipeline(
            AnimateDiffPipeline,
            folder,
            {"unet": unet, "vae": vae, "text_encoder": clip},
            make_prompts(),
            tokenizer=tokenizer,
            scheduler=make_scheduler(),
            motion_adapter=None,
        )

    config = TrainConfig(
        name=NAME,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=1e-3,
        warmup_steps=30,
        ema_decay=0.99,
        checkpoint_every=50,
        **shared,
    )
    frames = train_frames(latents, rows, captions, shared)
    clips = train_clips(frames, latents, rows, captions, shared)
    export = partial(write, folder=arguments.work / "export" / NAME)
    write(train_order(clips, latents, rows, captions, config, export), arguments.output)


if __name__ == "__main__":
    main()
