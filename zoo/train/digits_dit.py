"""Train zoo/digits-dit: a class-conditional latent diffusion transformer (DiTPipeline) that draws the digit asked for.

    python zoo/train/digits_dit.py --threads 2

Method: Scalable Diffusion Models with Transformers (2022, arXiv 2212.09748) on the latents of a small autoencoder,
with classifier-free guidance (2022, arXiv 2207.12598). Two stages: the autoencoder, then the transformer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from autoencoder import Latents, autoencoder_loss, encode, standardize_
from data import IMAGE_SIZE, NUM_CLASSES, Digits, Jitter, augment, draw_batch, load_digits
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding, TimestepEmbedding
from digits_unet import draw_timesteps
from torch import Tensor, nn
from trainer import TrainConfig, parse_arguments, replace_folder, shared_fields, train

NAME = "digits-dit"
NULL_CLASS = 1000  # DiTPipeline has this number written into it
LABEL_DROP = 0.1
POOL_COPIES = 16  # augmented copies of the data set that are encoded once, before the transformer is trained
JITTER = Jitter(degrees=7, scale=0.06, shift=0.6, probability=0.5)
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def make_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,  # `standardize_` scales the latents themselves
        mid_block_add_attention=False,
    )


def make_transformer() -> DiTTransformer2DModel:
    """Eight blocks of width 128; every residual branch starts closed (adaLN-Zero).

    Rows of the label tables that no digit uses are zero: they are never read and the file compresses better.
    """
    transformer = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=8,
        sample_size=IMAGE_SIZE // 2,
        patch_size=2,
        num_embeds_ada_norm=NULL_CLASS,
    )
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for module in transformer.modules():
        if isinstance(module, TimestepEmbedding):
            nn.init.normal_(module.linear_1.weight, std=0.02)
            nn.init.normal_(module.linear_2.weight, std=0.02)
        elif isinstance(module, LabelEmbedding):
            nn.init.normal_(module.embedding_table.weight, std=0.02)
            nn.init.zeros_(module.embedding_table.weight[NUM_CLASSES:NULL_CLASS])
            module.dropout_prob = 0.0  # it would draw anew in every block; `drop_labels` does it once per sample
    closed = [block.norm1.linear for block in transformer.transformer_blocks]
    for layer in (*closed, transformer.proj_out_1, transformer.proj_out_2):
        nn.init.zeros_(layer.weight)
    return transformer


def make_scheduler() -> DDIMScheduler:
    """Latents have no hard bounds, hence no clipping; spacing as in digits_unet."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )


def drop_labels(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Replace about LABEL_DROP of the labels by the null class, for all blocks alike."""
    dropped = torch.rand(len(labels), generator=generator) < LABEL_DROP
    return torch.where(dropped, NULL_CLASS, labels)


def encode_pool(autoencoder: AutoencoderKL, digits: Digits, seed: int) -> tuple[Latents, Tensor]:
    """Latents of augmented copies, and their labels: the encoder then costs nothing per step."""
    generator = torch.Generator().manual_seed(seed)
    copies = [augment(digits.images, JITTER, generator) for _ in range(POOL_COPIES)]
    return encode(autoencoder, torch.cat(copies)), digits.labels.repeat(POOL_COPIES)


def save_pipeline(transformer: nn.Module, autoencoder: AutoencoderKL, folder: Path) -> None:
    """Write float16 copies with the scheduler and the label names, as plain diffusers reads them."""
    copied, decoder = make_transformer(), make_autoencoder()
    copied.load_state_dict(transformer.state_dict())
    decoder.load_state_dict(autoencoder.state_dict())
    pipeline = DiTPipeline(copied.half().eval(), decoder.half().eval(), make_scheduler())

    def write(fresh: Path) -> None:
        pipeline.save_pretrained(fresh)
        index_path = fresh / "model_index.json"
        index = json.loads(index_path.read_text())
        index["id2label"] = {str(digit): f"{digit}, {name}" for digit, name in enumerate(DIGIT_NAMES)}
        index_path.write_text(json.dumps(index, indent=2) + "\n")

    replace_folder(folder, write)


def train_autoencoder(digits: Digits, config: TrainConfig) -> AutoencoderKL:
    def loss_of(model: nn.Module, generator: torch.Generator) -> Tensor:
        return autoencoder_loss(model, draw_batch(digits, config.batch_size, JITTER, generator).images, generator)

    autoencoder = train(make_autoencoder(), loss_of, config, lambda model: None)
    assert isinstance(autoencoder, AutoencoderKL)
    standardize_(autoencoder, digits.images)
    return autoencoder


def make_latent_loss(pool: Latents, labels: Tensor, batch_size: int, device: str) -> Callable[..., Tensor]:
    scheduler = make_scheduler()

    def loss_of(model: nn.Module, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(labels), (batch_size,), generator=generator)
        latents = pool.draw(index, generator)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = draw_timesteps(batch_size, generator)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        given = drop_labels(labels[index], generator)
        predicted = model(noisy.to(device), timestep=timesteps.to(device), class_labels=given.to(device)).sample
        return (predicted.float() - noise.to(device)).square().mean()

    return loss_of


def main() -> None:
    arguments = parse_arguments(__doc__ or "", name=NAME, steps=4500, batch_size=128)
    torch.manual_seed(arguments.seed)
    digits = load_digits()
    shared = shared_fields(arguments)
    autoencoder = train_autoencoder(
        digits,
        TrainConfig(name=f"{NAME}-vae", steps=1000, batch_size=64, learning_rate=1e-3, **shared),
    )
    pool, labels = encode_pool(autoencoder, digits, arguments.seed)
    config = TrainConfig(
        name=NAME, steps=arguments.steps, batch_size=arguments.batch_size, learning_rate=1e-3, **shared
    )
    torch.manual_seed(arguments.seed)  # the same start whether the autoencoder was trained now or found finished
    loss_of = make_latent_loss(pool, labels, arguments.batch_size, arguments.device)
    export = partial(save_pipeline, autoencoder=autoencoder)
    average = train(
        make_transformer(), loss_of, config, lambda model: export(model, folder=arguments.work / "export" / NAME)
    )
    export(average, folder=arguments.output)


if __name__ == "__main__":
    main()
