"""The autoencoders of the latent pipelines: their loss, even latents, and latents encoded once for all.

Letters: N images, L latent channels, h and w latent height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

KL_WEIGHT = 1e-5  # larger: smoother latents; from about 1e-3 on, half of the channels carry nothing but noise
ENCODE_BATCH = 512


@dataclass(frozen=True)
class Latents:
    """What the encoder says of a set of images."""

    means: Tensor  # (N, L, h, w)
    deviations: Tensor  # (N, L, h, w)

    def draw(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """One sample of the posterior for each of the indexed images."""
        means = self.means[index]
        return means + self.deviations[index] * torch.randn(means.shape, generator=generator)


def autoencoder_loss(model: nn.Module, images: Tensor, generator: torch.Generator) -> Tensor:
    """Squared error of the picture, and a little KL so that noise in the latents does not break the decoder."""
    images = images.to(next(model.parameters()).device)
    moments = model.quant_conv(model.encoder(images))  # (N, 2L, h, w): means, then log variances
    mean, log_variance = moments.float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-30, 20)
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    decoded = model.decoder(model.post_quant_conv(mean + (0.5 * log_variance).exp() * noise))
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return (decoded.float() - images).square().mean() + KL_WEIGHT * divergence


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, images: Tensor) -> Latents:
    found = [autoencoder.encode(batch.to(autoencoder.device)).latent_dist for batch in images.split(ENCODE_BATCH)]
    return Latents(torch.cat([one.mean.cpu() for one in found]), torch.cat([one.std.cpu() for one in found]))


@torch.no_grad()
def standardize_(autoencoder: AutoencoderKL, images: Tensor) -> None:
    """Give every latent channel mean 0 and variance 1 over the images, by folding the change into the 1x1 convolutions
    on both sides of the latents. What the autoencoder computes stays the same; the denoiser sees even channels."""
    latents = encode(autoencoder, images)
    mean = latents.means.mean(dim=(0, 2, 3)).to(autoencoder.device)  # (L,)
    spread = latents.means.var(dim=(0, 2, 3)) + latents.deviations.square().mean(dim=(0, 2, 3))
    variance, channels = spread.to(autoencoder.device), len(mean)
    into, back = autoencoder.quant_conv, autoencoder.post_quant_conv  # (2L, 2L, 1, 1) and (L, L, 1, 1)
    back.bias += back.weight[:, :, 0, 0] @ mean
    back.weight *= variance.sqrt()[None, :, None, None]
    into.weight[:channels] /= variance.sqrt()[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - mean) / variance.sqrt()
    into.bias[channels:] -= variance.log()  # the other half are log variances
