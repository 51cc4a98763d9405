"""Frechet distance (Heusel et al., 2017, arXiv 1706.08500) of the judge's features to those of real images, `fid`, or
of real clips, `frechet_video` (as the FVD of Unterthiner et al., 2018, arXiv 1812.01717):

    d = |m1 - m2|^2 + trace(C1 + C2 - 2 (C1 C2)^(1/2))

each set taken as a Gaussian with mean m and covariance C. The features are the judge's, not Inception's: distances
compare with others of the same judge and the same number of images only. D is the feature width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..result import Metric
from . import Case

NEEDS = ("judge",)
ENOUGH_IMAGES = 1000  # the distance is biased upwards below


def compute(case: Case) -> dict[str, Metric]:
    """One number; it has no interval, since resampling the images biases it."""
    assert case.judge is not None
    assert case.judged is not None
    features = case.judged.features
    count = len(features)
    if count < 2:
        return {}
    distance = frechet_distance(*gaussian(features), case.judge.mean, case.judge.covariance)
    note = None if count >= ENOUGH_IMAGES else f"from {count} samples only; biased upwards below {ENOUGH_IMAGES}"
    name = "fid" if case.judge.clip_reader is None else "frechet_video"
    return {name: Metric(value=distance, count=count, better="lower", note=note)}


def why_nothing(case: Case) -> str:
    """Why there is no distance."""
    return f"a distance between sets takes at least 2 samples; there is {len(case.samples)}"


def gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D), float64, of features (N, D)."""
    features = features.double()
    return features.mean(dim=0), torch.cov(features.T).reshape(features.shape[1], -1)


def frechet_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """Distance of two Gaussians; means (D,), covariances (D, D).

    trace (C1 C2)^(1/2) equals trace (R C2 R)^(1/2) with R = C1^(1/2). That matrix is symmetric, so its eigenvalues
    are real, also for the singular covariances of few images.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    middle = torch.linalg.eigvalsh(root @ other_covariance.double() @ root)
    spread = covariance.trace() + other_covariance.trace() - 2 * middle.clamp(min=0).sqrt().sum()
    return float((mean.double() - other_mean.double()).square().sum() + spread)
