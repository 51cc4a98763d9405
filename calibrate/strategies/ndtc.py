"""One call of each sample, drawn from a normal distribution that leans to the clean end.

PTQ4DM: Post-training Quantization on Diffusion Models (Shang et al., CVPR 2023), arXiv 2211.15736. With T calls:

    t = floor(Normal(mu, sd)), clamped to [0, T-1],        t = 0: the cleanest input, T-1: pure noise
    mu = mu_fraction T,    sd = sd_fraction T (form code: the authors' program), sqrt(T / 2) (form paper)

The sample itself runs to call T-1-t and is kept as it enters the denoiser there, with the timestep that it has there.
"""

from __future__ import annotations

import math
from random import Random
from typing import Literal

from pydantic import Field

from ...core.config import Config


class NDTCConfig(Config):
    """Fields of `--set`."""

    form: Literal["code", "paper"] = "code"  # paper: much narrower for long runs
    mu_fraction: float = Field(0.4, ge=0, le=1)  # mean of the draws; smaller: cleaner inputs
    sd_fraction: float = Field(0.4, gt=0, le=100)  # spread of the draws, form code alone; larger: nearer to uniform


CONFIG = NDTCConfig


def kept_calls(calls: int, samples: int, config: NDTCConfig, random: Random) -> list[tuple[int, ...]]:
    """For every sample the one call that is kept."""
    return [(calls - 1 - draw_timestep(calls, config, random),) for _ in range(samples)]


def draw_timestep(calls: int, config: NDTCConfig, random: Random) -> int:
    """One t in [0, T-1], counted from the clean end."""
    sd = config.sd_fraction * calls if config.form == "code" else math.sqrt(calls / 2)
    return min(max(math.floor(random.normalvariate(config.mu_fraction * calls, sd)), 0), calls - 1)
