"""What zoo/digits-video needs before its denoiser: an autoencoder of frames, a text encoder, and latents made once.

Letters: N clips, F = 8 frames, T = 8 tokens, D = 64 text width, L = 4 latent channels.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from autoencoder import Latents, autoencoder_loss, encode, standardize_
from clips import DIRECTIONS, FRAME_SIZE, all_captions, draw_clips
from data import NUM_CLASSES, Digits
from diffusers import AutoencoderKL
from shapes_stages import Understanding, make_clip, make_clip_tokenizer, tokenize
from torch import Tensor, nn
from trainer import TrainConfig, train
from transformers import CLIPTextModel, CLIPTokenizer

TEXT_LENGTH = 8  # the longest caption has 7 tokens with both ends
TEXT_WIDTH = 64
LATENT_CHANNELS = 4
POOL_CLIPS = 3072  # encoded once, before the denoiser is trained
POOL_PART = 512  # clips that are drawn at a time


def make_autoencoder() -> AutoencoderKL:
    """32x32 grey to 8x8x4."""
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=FRAME_SIZE,
        scaling_factor=1.0,  # `standardize_` scales the latents themselves
        mid_block_add_attention=False,
    )


def draw_frames(digits: Digits, count: int, generator: torch.Generator) -> Tensor:
    """One random frame each of as many clips: (N, 1, S, S)."""
    frames = draw_clips(digits, count, generator).frames
    return frames[torch.arange(count), torch.randint(frames.shape[1], (count,), generator=generator)]


def train_autoencoder(digits: Digits, shared: dict[str, Any]) -> AutoencoderKL:
    """The autoencoder alone, on frames that are made as they are needed; `shared`: fields of TrainConfig."""
    config = TrainConfig(name="digits-video-vae", steps=900, batch_size=32, learning_rate=2e-3, **shared)

    def loss_of(model: nn.Module, generator: torch.Generator) -> Tensor:
        return autoencoder_loss(model, draw_frames(digits, config.batch_size, generator), generator)

    torch.manual_seed(config.seed)
    autoencoder = train(make_autoencoder(), loss_of, config, lambda model: None).cpu()
    assert isinstance(autoencoder, AutoencoderKL)
    generator = torch.Generator().manual_seed(config.seed)
    standardize_(autoencoder, draw_frames(digits, 2048, generator))
    shown = draw_frames(digits, 256, generator)
    with torch.no_grad():
        error = (autoencoder(shown).sample - shown).square().mean()
    print(f"{config.name}: squared error {error:.4f} of values in [-1, 1]", file=sys.stderr)
    return autoencoder


def encode_clips(autoencoder: AutoencoderKL, digits: Digits, seed: int) -> tuple[Latents, Tensor]:
    """Latents (N, F, L, h, w) of POOL_CLIPS clips, and the row of `all_captions` of each."""
    generator = torch.Generator().manual_seed(seed)
    parts = [draw_clips(digits, POOL_PART, generator) for _ in range(POOL_CLIPS // POOL_PART)]
    encoded = [encode(autoencoder, part.frames.flatten(0, 1)) for part in parts]
    shape = (POOL_CLIPS, parts[0].frames.shape[1])
    latents = Latents(
        torch.cat([one.means for one in encoded]).unflatten(0, shape),
        torch.cat([one.deviations for one in encoded]).unflatten(0, shape),
    )
    return latents, torch.cat([part.rows for part in parts])


def train_clip(shared: dict[str, Any]) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """Teach the text encoder to say which digit a caption names, and where it moves."""
    captions = all_captions()
    words = {word for both in captions for caption in both for word in caption.split()}
    tokenizer = make_clip_tokenizer(words, TEXT_LENGTH)
    torch.manual_seed(shared["seed"])
    understanding = Understanding(make_clip(tokenizer, TEXT_WIDTH), NUM_CLASSES + len(DIRECTIONS), pad=None)
    config = TrainConfig(name="digits-video-clip", steps=400, batch_size=64, learning_rate=1e-3, **shared)
    ids = torch.stack([tokenize(tokenizer, both) for both in captions])  # (M, 2, T)

    def loss_of(model: nn.Module, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(ids), (config.batch_size,), generator=generator)
        form = torch.randint(2, (config.batch_size,), generator=generator)
        digit, direction = model(ids[rows, form].to(config.device)).split([NUM_CLASSES, len(DIRECTIONS)], dim=1)
        wanted = rows.to(config.device)
        return F.cross_entropy(digit, wanted // len(DIRECTIONS)) + F.cross_entropy(direction, wanted % len(DIRECTIONS))

    taught = train(understanding, loss_of, config, lambda model: None).cpu()
    assert isinstance(taught, Understanding)
    return taught.encoder, tokenizer
