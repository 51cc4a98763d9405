"""The clean sample that a denoiser predicts, and the same with new noise.

x = a x0 + s n        what enters the denoiser: a signal level, s noise level, n noise

epsilon       x0 = (x - s e) / a        a = 1 / sqrt(1 + r^2), s = r a, r = sigma of the grid
v_prediction  x0 = a x - s v            (Salimans and Ho, 2022, ICLR, arXiv 2202.00512)
sample        x0 = the output
flow          x0 = x - s v              a = 1 - s, s = sigma of the grid
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...runtime.clock import RunState

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]
MEAN, DEVIATION = -1.0, 1.0  # of the logarithm of s / a of new noise


@dataclass(frozen=True)
class Level:
    """How much of signal and of noise there is."""

    signal: float  # a
    noise: float  # s

    @property
    def ratio(self) -> float:
        """s / a."""
        return self.noise / max(self.signal, 1e-6)


def level_of(sigma: float, prediction: Prediction) -> Level:
    """The level of a call, from the sigma of its run."""
    if prediction == "flow":
        return Level(1 - sigma, sigma)
    signal = 1 / math.sqrt(1 + sigma**2)
    return Level(signal, sigma * signal)


def clean_sample(sample: Tensor, output: Tensor, level: Level, prediction: Prediction) -> Tensor:
    """x0."""
    if prediction == "epsilon":
        return (sample - level.noise * output) / level.signal
    if prediction == "v_prediction":
        return level.signal * sample - level.noise * output
    return output if prediction == "sample" else sample - level.noise * output


class NoiseLevels:
    """The levels of a grid, from which new ones are interpolated.

    Args:
        states: of the calls of a run; those without a sigma do not count.
    """

    def __init__(self, states: Iterable[RunState | None], prediction: Prediction) -> None:
        known = {state.timestep: state.sigma for state in states if state and state.sigma}
        self._prediction = prediction
        pairs = ((time, level_of(sigma, prediction)) for time, sigma in known.items())
        self._points = sorted((math.log(level.ratio), time) for time, level in pairs if level.noise and level.signal)

    def __bool__(self) -> bool:
        return len(self._points) > 1

    def draw(self, generator: torch.Generator, *, whole: bool) -> tuple[float, Level]:
        """A timestep and its level, log-normal but within the grid.

        Args:
            whole: timesteps are integers.
        """
        ratio = MEAN + DEVIATION * float(torch.randn((), generator=generator))
        time = _between([(ratio_, time) for ratio_, time in self._points], ratio)
        if whole:
            time = float(round(time))
        ratio = math.exp(_between(sorted((time_, ratio_) for ratio_, time_ in self._points), time))
        return time, level_of(ratio / (1 + ratio) if self._prediction == "flow" else ratio, self._prediction)


def _between(points: list[tuple[float, float]], at: float) -> float:
    """Linear interpolation; the ends go on as they are."""
    if at <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in itertools.pairwise(points):
        if at <= right:
            return low + (high - low) * (at - left) / (right - left)
    return points[-1][1]
