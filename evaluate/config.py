"""Options of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from ..core.config import Config


class EvaluateConfig(Config):
    """What to measure, and how long to take over it."""

    num: int = Field(default=64, ge=1)  # images per source; more: narrower intervals, longer
    steps: int | None = Field(default=None, ge=1)  # solver steps; None: the zoo's own number, else 20
    guidance_scale: float | None = None  # None: the zoo's own, else the pipeline's default
    labels: tuple[int, ...] | None = None  # classes, dealt to the images in turn; None: all of the zoo's
    prompts: tuple[str, ...] | None = None  # dealt to the images in turn; None: the zoo's own, else a few neutral ones
    negative_prompt: str | None = None  # what guidance leads away from
    height: int | None = Field(default=None, ge=1)  # pixels; None: the zoo's own, else the pipeline's default
    width: int | None = Field(default=None, ge=1)
    num_frames: int | None = Field(default=None, ge=1)  # of a clip; None: the zoo's own, else the pipeline's default
    seed: int = Field(default=0, ge=0)  # another seed: other noise
    batch_size: int = Field(default=16, ge=1)  # images per pipeline call; larger: faster, more memory
    metrics: tuple[str, ...] = ()  # names of metric files; empty: all that apply
    speed: bool = True  # time the sources in turns
    speed_repeats: int = Field(default=5, ge=1)  # more: steadier medians
    speed_batch_size: int = Field(default=1, ge=1)  # images per timed call
    memory: bool = True  # load every source once more in a process of its own
    output: Path | None = None  # folder for evaluation.json and samples.png; None: write nothing
    grid_images: int = Field(default=10, ge=1)  # columns of the picture
    device: str = "auto"
    dtype: str = "auto"
    prefer: Literal["memory", "speed"] = "memory"  # how quantized layers run, see load_source
