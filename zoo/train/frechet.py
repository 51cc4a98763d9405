"""Frechet distance between two sets of features (2017, arXiv 1706.08500), each taken as a Gaussian:

    d = |m1 - m2|^2 + trace(C1 + C2 - 2 (C1 C2)^(1/2))

D is the feature width. Everything is float64: the square root of a nearly singular covariance needs the digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    mean: Tensor  # (D,) float64
    covariance: Tensor  # (D, D) float64


def fit_gaussian(features: Tensor) -> Gaussian:
    return Gaussian(features.double().mean(dim=0), torch.cov(features.double().T))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """trace (C1 C2)^(1/2) is taken as the trace of the root of C1^(1/2) C2 C1^(1/2), which is symmetric."""
    values, vectors = torch.linalg.eigh(first.covariance)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    middle = torch.linalg.eigvalsh(root @ second.covariance @ root)
    trace = first.covariance.trace() + second.covariance.trace() - 2 * middle.clamp(min=0).sqrt().sum()
    return float((first.mean - second.mean).square().sum() + trace)


def distance_between_halves(features: Tensor, *, splits: int, seed: int) -> float:
    """Mean distance between two random halves of one set: what sampling alone costs at that size."""
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(splits):
        first, second = features[torch.randperm(len(features), generator=generator)].chunk(2)
        distances.append(frechet_distance(fit_gaussian(first), fit_gaussian(second)))
    return sum(distances) / splits
