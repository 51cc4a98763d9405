"""Calls spread evenly over the run, of all samples: the inputs of every phase of sampling count alike.

Q-Diffusion: Quantizing Diffusion Models (Li et al., ICCV 2023), arXiv 2302.04304. With K timesteps of C calls:

    calls = { floor(i C / K) : i = 0..K-1 }

which is every (C / K)-th call from the first where K divides C; elsewhere the gaps differ by one.
"""

from __future__ import annotations

from random import Random

from pydantic import Field

from ...core.config import Config


class UniformConfig(Config):
    """Fields of `--set`."""

    timesteps: int = Field(20, ge=1)  # calls kept of each run; more: better statistics, larger set


CONFIG = UniformConfig


def kept_calls(calls: int, samples: int, config: UniformConfig, random: Random) -> list[tuple[int, ...]]:
    """For every sample the calls that are kept, ascending."""
    kept = min(config.timesteps, calls)
    return [tuple(index * calls // kept for index in range(kept))] * samples
