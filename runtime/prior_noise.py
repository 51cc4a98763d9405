"""The noise that a run began with, added again to its sample a little before every later step: the noise injection of
Faster Diffusion (2024), arXiv 2312.09608, which brings back high frequencies that reused features lack.

    z_t <- z_t + share z_T    before the step of every call with t / T < 1/2

That is for samples of unit variance. Solvers that run over sigma (Euler, Heun, LMS, ...) begin with noise of a standard
deviation s and their samples have 1 + sigma^2: there share is times sqrt(1 + sigma^2) / s, which is the same to the
denoiser.

It changes the sampler, and is left out where a run begins in the middle: there is no noise that it began with.
Letters: t timestep of a call, T timesteps that the model was trained on.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .clock import RunState

LATE = 0.5  # of the timesteps
TRAINED_STEPS = 1000  # where a scheduler does not tell


class PriorNoise:
    """Of one run.

    Args:
        share: of the first sample.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._first: Tensor | None = None

    def __call__(self, sample: Tensor, state: RunState, scheduler: Any) -> Tensor:
        """What is stepped from in place of the sample of a call."""
        if state.call == 0 and self._first is None:
            self._first = sample.detach()
        late = state.timestep < LATE * (scheduler.config.get("num_train_timesteps") or TRAINED_STEPS)
        if self._first is None or not late or self._first.shape != sample.shape:
            return sample
        return sample + self._share * _growth(state.sigma, scheduler) * self._first


def _growth(sigma: float | None, scheduler: Any) -> float:
    """Standard deviation of a sample at `sigma` over that of the first one."""
    first = float(getattr(scheduler, "init_noise_sigma", 1.0))
    return 1.0 if first == 1.0 or sigma is None else math.sqrt(1 + sigma**2) / first
