"""A schedule file of Evolutionary Caching to Accelerate Your Off-the-Shelf Diffusion Model (ECAD, 2025), arXiv
2506.15682, as it is: nothing is searched, and nothing asked for but the file. cache/ecad.py describes it.
"""

from __future__ import annotations

from pathlib import Path

from ...core.config import Config


class EcadConfig(Config):
    """Fields of `--set`."""

    file: Path  # the schedule, JSON


CONFIG = EcadConfig
NEEDS: tuple[str, ...] = ()
UNITS = "given"
