"""Gates: each call decides by itself whether the blocks behind the first run, from what the first one gave. After
first-block caching (ParaAttention, diffusers) and CG-Taylor (2025), which looks at how good a forecast of the first
block is and forecasts the last one. The search places the warm-up and chooses the threshold; `runtime/gate.py` decides.

Letters: C calls of a run, K calls that compute, on the mean of the profiled runs.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Literal

from pydantic import Field

from ...core.cache_plan import Gate, Predictor
from ...core.config import Config
from ...core.errors import UnsupportedError

TRIALS = 10  # thresholds that are tried
ENDLESS = 1e9  # a threshold that every change is below
FIRST, FACTOR = 0.1, 4.0  # where the search begins, and its steps until the answer lies between two


class GatedConfig(Config):
    """Fields of `--set`."""

    signal: Literal["residual", "forecast"] = "residual"  # what the first block adds against what it added; or what it
    # gives against its forecast
    probe_order: int = Field(1, ge=1, le=6)  # of that forecast
    skip: Literal["forecast", "reuse"] = "forecast"  # what a skipped call does
    order: int = Field(1, ge=1, le=6)  # of the forecast of what is skipped
    warmup: int = Field(3, ge=1)  # calls at the start that all compute
    last_full: int = Field(1, ge=0)  # calls at the end that do
    max_consecutive: int | None = Field(4, ge=1)  # skipped calls in a row


CONFIG = GatedConfig
NEEDS: tuple[str, ...] = ()


def schedule(calls: int, computed: int, config: GatedConfig) -> tuple[int, ...]:
    """The calls that compute whatever the gate says, ascending, the first of them 0.

    Args:
        calls: C.
        computed: K, at least `least`.
    """
    return tuple(sorted({*range(min(config.warmup, calls)), *range(max(calls - config.last_full, 0), calls)}))


def least(calls: int, config: GatedConfig) -> int:
    """How many calls compute in any plan."""
    return len(schedule(calls, calls, config))


def predictor(config: GatedConfig) -> Predictor | None:
    """How skipped calls are forecast; None where they reuse."""
    return Predictor(order=config.order) if config.skip == "forecast" else None


def gate(config: GatedConfig, threshold: float) -> Gate:
    """The gate of a plan with such a threshold."""
    return Gate(
        signal=config.signal,
        order=config.probe_order,
        threshold=threshold,
        max_consecutive=config.max_consecutive,
    )


def fit_threshold(cost: Callable[[float], float], allowed: float, near: float) -> tuple[float, int]:
    """The smallest threshold that was found to cost no more than is allowed, and how many were tried.

    Args:
        cost: what runs with a threshold cost, measured; it falls, in steps, while the threshold grows.
        allowed: what they may cost.
        near: a cost so little below is good enough.

    Raises:
        UnsupportedError: they cost more even where every call that may is skipped.
    """
    cheapest = cost(ENDLESS)
    if cheapest > allowed:
        raise UnsupportedError(
            f"runs cost {cheapest:.3f} of the full ones when every call is skipped that may be, more than the target's "
            f"{allowed:.3f}.",
            mend="Ask for less, or raise --set max_consecutive=N and lower --set warmup=N.",
        )
    low, best, threshold, tried = 0.0, ENDLESS, FIRST, 1
    while tried < TRIALS and allowed - cheapest > near:
        found, tried = cost(threshold), tried + 1
        if found <= allowed:
            best, cheapest = threshold, found
        else:
            low = threshold
        threshold = _between(low, best, threshold)
    return best, tried


def _between(low: float, best: float, last: float) -> float:
    """The next threshold: their geometric mean once the answer lies between two, before that a step further."""
    if low and best < ENDLESS:
        return sqrt(low * best)
    return last * FACTOR if low else last / FACTOR
