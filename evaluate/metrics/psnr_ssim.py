"""Likeness to the reference's images from the same noise: peak signal-to-noise ratio in dB and structural similarity
(Wang et al., 2004), both by torchmetrics."""

from __future__ import annotations

from ...runtime.compare import psnr, ssim
from ..result import Metric
from ..statistics import summarize
from . import Case

NEEDS = ("reference",)


def compute(case: Case) -> dict[str, Metric]:
    """Means over images, with the worst images. PSNR is capped at 100 dB, which equal images get."""
    assert case.reference is not None
    first, second = case.reference.images, case.samples.images
    return {
        "psnr": summarize(psnr(first, second).tolist(), case.seeds, better="higher"),
        "ssim": summarize(ssim(first, second).tolist(), case.seeds, better="higher"),
    }
