"""Schedulers with dynamic shifting (Flux, Qwen-Image, LTX, ...) take other sigmas for other sizes: a plan that is
searched at one size is on another grid at all others."""

from __future__ import annotations

import inspect
from typing import Any

from ..core.reporter import Reporter
from .config import SearchCacheConfig

SIZES = ("height", "width", "num_frames")


def tell_of_shifting(pipe: Any, config: SearchCacheConfig, reporter: Reporter) -> None:
    """A notice where a size is asked for that is not the model's own and moves the grid of the plan."""
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None or not scheduler.config.get("use_dynamic_shifting"):
        return
    asked = {name: getattr(config, name) for name in SIZES}
    other = [f"{name} {value}" for name, value in asked.items() if value is not None and value != _own_size(pipe, name)]
    if other:
        reporter.notice(
            f"the sigmas of {type(scheduler).__name__} depend on the size (dynamic shifting): the plan is for "
            f"{', '.join(other)}; other sizes follow its noise levels, without corrections and fitted forecasts"
        )


def _own_size(pipe: Any, name: str) -> int | None:
    """What a pipeline takes where nobody asks; None where that is not known."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get(name)
    if parameter is not None and isinstance(parameter.default, int):
        return parameter.default
    sample, factor = getattr(pipe, "default_sample_size", None), getattr(pipe, "vae_scale_factor", None)
    if name == "num_frames" or not isinstance(sample, int) or not isinstance(factor, int):
        return None
    return int(sample * factor)
