"""Intervals for small samples, all at 95 %."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy

from .result import Metric

RESAMPLES = 2000
Z95 = 1.959963984540054  # two-sided normal quantile


def summarize(values: Sequence[float], seeds: Sequence[int], *, better: Literal["lower", "higher"]) -> Metric:
    """Mean over images with its interval and the worst image."""
    worst = max(range(len(values)), key=lambda index: values[index] if better == "lower" else -values[index])
    low, high = bootstrap_interval(values)
    return Metric(
        value=sum(values) / len(values),
        low=low,
        high=high,
        worst=values[worst],
        worst_seed=seeds[worst],
        count=len(values),
        better=better,
    )


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """Percentile bootstrap of the mean; resampled with a fixed seed, so that equal values give equal intervals."""
    data = numpy.asarray(values, dtype=numpy.float64)
    picks = numpy.random.default_rng(0).integers(len(data), size=(RESAMPLES, len(data)))
    low, high = numpy.percentile(data[picks].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def share(right: Sequence[bool], *, note: str | None = None) -> Metric:
    """Share of images that are right, with its interval."""
    successes, count = sum(right), len(right)
    low, high = wilson_interval(successes, count)
    return Metric(value=successes / count, low=low, high=high, count=count, better="higher", note=note)


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """Wilson's score interval of a share; sensible also at 0 and at 1."""
    if not 0 <= successes <= count or count == 0:
        raise ValueError(f"{successes} of {count} is not a share")
    share, z2 = successes / count, Z95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)
