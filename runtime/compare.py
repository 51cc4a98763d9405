"""How far two runs from the same noise are apart.

Letters: N samples, F frames of a clip, C channels, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.manifest import Effect

MAX_PSNR = 100.0  # dB; identical images would be infinite, which JSON cannot hold


@dataclass(frozen=True)
class Samples:
    """Results of one request, on the CPU."""

    latents: Tensor  # (N, ...) float32, the last sample that the scheduler made; (N, C, H, W) for images
    images: Tensor  # (N, C, H, W) float32 in [0, 1]; clips: (N, F, C, H, W)

    def __len__(self) -> int:
        return len(self.images)


def compare(reference: Samples, other: Samples, *, steps: int = 0) -> Effect:
    """Mean differences between two runs of one request."""
    if not torch.isfinite(other.latents).all() or not torch.isfinite(other.images).all():
        return Effect(seeds=len(other), steps=steps, not_measured="the compressed run gives NaN or infinity")
    return Effect(
        relative_l2=relative_l2(reference.latents, other.latents).mean().item(),
        psnr=psnr(reference.images, other.images).mean().item(),
        ssim=ssim(reference.images, other.images).mean().item(),
        seeds=len(other),
        steps=steps,
    )


def relative_l2(reference: Tensor, other: Tensor) -> Tensor:
    """||a - b|| / ||a|| of every sample: (N,) from two (N, ...)."""
    first, second = reference.flatten(1).double(), other.flatten(1).double()
    errors: Tensor = torch.linalg.vector_norm(first - second, dim=1)
    lengths: Tensor = torch.linalg.vector_norm(first, dim=1)
    return errors.div(lengths.clamp(min=1e-12))


def psnr(reference: Tensor, other: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of every image (N, C, H, W) or clip (N, F, C, H, W) in [0, 1]; at most 100."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    within = tuple(range(1, reference.ndim))
    values: Tensor = peak_signal_noise_ratio(other, reference, data_range=1.0, reduction="none", dim=within)
    return values.clamp(max=MAX_PSNR)


def ssim(reference: Tensor, other: Tensor) -> Tensor:
    """Structural similarity of every image (N, C, H, W) in [0, 1], or the mean over the frames of every clip: (N,).

    The usual 11 x 11 Gaussian window (sigma 1.5) for images of at least 16 pixels, a smaller one below.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    sigma = min(1.5, min(reference.shape[-2:]) / 11)
    first, second = reference.flatten(0, -4), other.flatten(0, -4)
    values = structural_similarity_index_measure(second, first, sigma=sigma, data_range=1.0, reduction="none")
    return torch.as_tensor(values).reshape(len(reference), -1).mean(dim=1)
