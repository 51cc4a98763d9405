"""The scale by which a pipeline combined its guidance branches in the runs of a calibration set."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import diffusers

from ..core.calibration import CalibrationRecord
from ..runtime.trajectory import DenoiserCall


def guidance_of(record: CalibrationRecord, *, distilled: bool) -> float | None:
    """What the set was asked for, else the default of the pipeline's call; None: not known.

    Args:
        distilled: the denoiser takes the scale that is asked for itself; branches, where the pipeline can evaluate them
            all the same, are combined by its own `true_cfg_scale`.
    """
    pipeline = getattr(diffusers, record.pipeline, None)
    parameters = inspect.signature(pipeline.__call__).parameters if pipeline else {}
    true_scale, asked = parameters.get("true_cfg_scale"), record.recipe.get("guidance_scale")
    if asked is not None and not (true_scale and distilled):
        return float(asked)
    combining = true_scale or parameters.get("guidance_scale")
    return float(combining.default) if combining and isinstance(combining.default, int | float) else None


def has_branches(calls: Iterable[DenoiserCall]) -> bool:
    """Whether the pipeline combined what the denoiser gave with a prompt or class, and without."""
    return any(call.state and call.state.branch in ("uncond", "both") for call in calls)
