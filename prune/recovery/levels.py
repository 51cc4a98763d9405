"""Noise levels between those of a grid, for new noise on clean samples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import torch

from ...runtime.clock import RunState
from ..noise import Noise

MEAN, DEVIATION = -1.0, 1.0  # of the logarithm of noise over signal


class NoiseLevels:
    """The levels of a grid, from which new ones are interpolated.

    Args:
        states: of the calls of a run; those without a sigma do not count.
    """

    def __init__(self, states: Iterable[RunState | None], noise: Noise) -> None:
        known = {state.timestep: state.sigma for state in states if state and state.sigma}
        self._noise = noise
        bounded = {time: level for time, level in known.items() if noise.target != "flow" or level < 1}
        self._points = sorted((math.log(noise.ratio(level)), time) for time, level in bounded.items())

    def __bool__(self) -> bool:
        return len(self._points) > 1

    def draw(self, generator: torch.Generator, *, whole: bool) -> tuple[float, float]:
        """A timestep and its noise level, log-normal but within the grid.

        Args:
            whole: timesteps are integers.
        """
        ratio = MEAN + DEVIATION * float(torch.randn((), generator=generator))
        time = _between([(ratio_, time) for ratio_, time in self._points], ratio)
        if whole:
            time = float(round(time))
        ratio = math.exp(_between(sorted((time_, ratio_) for ratio_, time_ in self._points), time))
        return time, self._noise.level_at(ratio)


def _between(points: list[tuple[float, float]], at: float) -> float:
    """Linear interpolation; the ends go on as they are."""
    if at <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in itertools.pairwise(points):
        if at <= right:
            return low + (high - low) * (at - left) / (right - left)
    return points[-1][1]
