"""The UCI handwritten digits as 16x16 images: loading, splitting, gentle augmentation.

Only training needs scikit-learn (it carries the 1797 real 8x8 digits offline); nothing that evaluates does.
Shapes: N images, 1 channel, S = 16 pixels a side. Values lie in [-1, 1], background -1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGE_SIZE = 16
NUM_CLASSES = 10
SPLIT_SEED = 2026  # the judge's held-out digits must stay the same whatever seed a training uses
HELD_OUT_FRACTION = 0.2


@dataclass(frozen=True)
class Digits:
    images: Tensor  # (N, 1, S, S) float32 in [-1, 1]
    labels: Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Digits:
        return Digits(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Jitter:
    """How far augmentation moves a digit, and how often it moves one at all."""

    degrees: float  # rotation, either way
    scale: float  # relative growth or shrinkage
    shift: float  # pixels, either way
    probability: float  # share of the images that are moved; the others stay as they are


def load_digits() -> Digits:
    """All 1797 digits, brought from 8x8 to 16x16 by bicubic interpolation."""
    from sklearn.datasets import load_digits as load_sklearn_digits

    raw = load_sklearn_digits()
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 8 - 1  # values 0..16 -> [-1, 1]
    upscaled = F.interpolate(images, size=IMAGE_SIZE, mode="bicubic", align_corners=False)
    return Digits(upscaled.clamp(-1, 1), torch.tensor(raw.target, dtype=torch.int64))


def split_digits(digits: Digits) -> tuple[Digits, Digits]:
    """(train, held out), the same share of every class in both."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    held_out = torch.zeros(len(digits), dtype=torch.bool)
    for digit in range(NUM_CLASSES):
        members = (digits.labels == digit).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        held_out[members[order[: round(HELD_OUT_FRACTION * len(members))]]] = True
    return digits.take(~held_out), digits.take(held_out)


def augment(images: Tensor, jitter: Jitter, generator: torch.Generator) -> Tensor:
    """Rotate, scale and shift each image a little; what enters at the border is background."""
    count = len(images)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * limit

    angle, zoom = uniform(math.radians(jitter.degrees)), 1 + uniform(jitter.scale)
    shift_x, shift_y = (uniform(jitter.shift * 2 / IMAGE_SIZE) for _ in range(2))
    cosine, sine = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    affine = torch.stack([cosine, -sine, shift_x, sine, cosine, shift_y], dim=1).reshape(count, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    moved = F.grid_sample(images + 1, grid, mode="bicubic", padding_mode="zeros", align_corners=False) - 1
    chosen = torch.rand(count, generator=generator) < jitter.probability
    return torch.where(chosen[:, None, None, None], moved.clamp(-1, 1), images)


def draw_batch(digits: Digits, batch_size: int, jitter: Jitter, generator: torch.Generator) -> Digits:
    """A random batch, with replacement, augmented."""
    batch = digits.take(torch.randint(len(digits), (batch_size,), generator=generator))
    return Digits(augment(batch.images, jitter, generator), batch.labels)
