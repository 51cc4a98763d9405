"""Every call of the run, of all samples: what scales of their own for each step need.

TFMQ-DM: Temporal Feature Maintenance Quantization for Diffusion Models (Huang et al., CVPR 2024), arXiv 2311.16503.
"""

from __future__ import annotations

from random import Random

from ...core.config import Config


class EveryStepConfig(Config):
    """No fields."""


CONFIG = EveryStepConfig


def kept_calls(calls: int, samples: int, config: EveryStepConfig, random: Random) -> list[tuple[int, ...]]:
    """For every sample the calls that are kept, ascending."""
    return [tuple(range(calls))] * samples
