"""Train zoo/digits-unet: an unconditional pixel-space UNet (DDIMPipeline) that draws handwritten digits.

    python zoo/train/digits_unet.py --threads 2

Method: Denoising Diffusion Probabilistic Models (2020, arXiv 2006.11239), the simple loss:
    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,   loss = |eps - model(x_t, t)|^2
"""

from __future__ import annotations

from pathlib import Path

import torch
from data import IMAGE_SIZE, Jitter, draw_batch, load_digits
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor, nn
from trainer import TrainConfig, parse_arguments, replace_folder, train

NAME = "digits-unet"
JITTER = Jitter(degrees=7, scale=0.06, shift=0.6, probability=0.5)


def make_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=IMAGE_SIZE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(64, 128, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    """Trailing spacing starts at the last timestep whatever the number of steps, so few steps work too."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        clip_sample=True,  # pixels are known to lie in [-1, 1]
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )


def draw_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """One timestep from each of `count` equal parts of 0..999: less noise in the loss than independent draws."""
    position = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return (position * 1000).long().clamp(max=999)


def save_pipeline(unet: nn.Module, folder: Path) -> None:
    """Write a float16 copy with the scheduler, as plain diffusers reads it."""
    copied = make_unet()
    copied.load_state_dict(unet.state_dict())
    pipeline = DDIMPipeline(unet=copied.half().eval(), scheduler=make_scheduler())
    replace_folder(folder, lambda fresh: pipeline.save_pretrained(fresh))


def main() -> None:
    arguments = parse_arguments(__doc__ or "", name=NAME, steps=3000, batch_size=64)
    torch.manual_seed(arguments.seed)
    digits, scheduler = load_digits(), make_scheduler()

    def loss_of(model: nn.Module, generator: torch.Generator) -> Tensor:
        images = draw_batch(digits, arguments.batch_size, JITTER, generator).images
        noise = torch.randn(images.shape, generator=generator)
        timesteps = draw_timesteps(len(images), generator)
        noisy = scheduler.add_noise(images, noise, timesteps)
        predicted = model(noisy.to(arguments.device), timesteps.to(arguments.device)).sample
        return (predicted.float() - noise.to(arguments.device)).square().mean()

    config = TrainConfig(
        name=NAME,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=4e-4,
        decay_fraction=1 / 3,
        bf16=True,
        seed=arguments.seed,
        device=arguments.device,
        work=arguments.work,
    )
    average = train(make_unet(), loss_of, config, lambda model: save_pipeline(model, arguments.work / "export" / NAME))
    save_pipeline(average, arguments.output)


if __name__ == "__main__":
    main()
