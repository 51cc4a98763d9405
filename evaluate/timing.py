"""Wall-clock time of several pipelines, measured in turns so that a busy machine disturbs all of them alike."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

from ..core.reporter import Reporter
from ..runtime.request import RunRequest
from ..runtime.timing import measure_in_turns
from ..runtime.trajectory import sample
from .result import Speed


def measure_speed(
    pipes: Sequence[Any], request: RunRequest, *, repeats: int, reporter: Reporter | None = None
) -> list[Speed]:
    """Seconds per image of every pipeline, and its speed-up over the first.

    Every pipeline runs once to warm up, then once per repeat, each time in another order.
    """
    seconds = measure_in_turns([partial(sample, pipe, request) for pipe in pipes], repeats, reporter)
    images = len(request.seeds)
    return [
        _speed([value / images for value in own], None if own is seconds[0] else _ratios(seconds[0], own), request)
        for own in seconds
    ]


def _ratios(reference: list[float], own: list[float]) -> list[float]:
    return [first / second for first, second in zip(reference, own, strict=True)]


def _speed(per_image: list[float], ratios: list[float] | None, request: RunRequest) -> Speed:
    return Speed(
        seconds_per_image=statistics.median(per_image),
        seconds_low=min(per_image),
        seconds_high=max(per_image),
        speedup=statistics.median(ratios) if ratios else None,
        speedup_low=min(ratios) if ratios else None,
        speedup_high=max(ratios) if ratios else None,
        repeats=len(per_image),
        batch_size=len(request.seeds),
        steps=request.num_inference_steps,
    )
