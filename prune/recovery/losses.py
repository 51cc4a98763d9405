"""How far the student is from the teacher.

output   ||e - e^||^2 / ||e||^2                         e: what the teacher gives, e^: the student
feature  mean over taps of ||h - h^||^2 / ||h||^2       h: what a module of the teacher gives (LAPTOP-Diff, 2024,
         arXiv 2404.11098, divides by the teacher's norm); of tokens, values more than 2 standard deviations from
         their tensor's mean, in either network, are left out (TinyFusion, 2025, CVPR, arXiv 2412.01199)
task     ||w - e^||^2 / ||w||^2                         w: what the noise in a user's picture asks for, see `noise.py`;
         the loss of the first training, beside distillation as in BK-SDM (2024, ECCV, arXiv 2305.15798)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .taps import Feature

TOKENS = 3  # dimensions of a sequence of tokens; feature maps have 4 or 5
TINY = 1e-12


def output_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """||e - e^||^2 / ||e||^2."""
    return _relative(student.float() - teacher.float(), teacher.float())


def feature_loss(student: Sequence[Feature], teacher: Sequence[Feature], mask_std: float) -> Tensor:
    """Mean over taps, and over the streams of each, of their relative errors.

    Args:
        mask_std: how far, in standard deviations, a value of a token may lie from the mean to count; 0: any.
    """
    errors = [
        torch.stack(
            [_feature_error(one.float(), other.float(), mask_std) for one, other in zip(ours, theirs, strict=True)]
        )
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack([error.mean() for error in errors]).mean()


def _feature_error(student: Tensor, teacher: Tensor, mask_std: float) -> Tensor:
    if not mask_std or teacher.ndim != TOKENS:
        return _relative(student - teacher, teacher)
    kept = _usual(student.detach(), mask_std) & _usual(teacher, mask_std)
    return _relative((student - teacher) * kept, teacher * kept)


def _usual(values: Tensor, mask_std: float) -> Tensor:
    return (values - values.mean()).abs() <= mask_std * values.std()


def _relative(difference: Tensor, reference: Tensor) -> Tensor:
    return difference.square().sum() / (reference.square().sum() + TINY)
