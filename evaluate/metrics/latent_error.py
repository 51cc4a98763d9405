"""Relative error of the final latents: ||a - b|| / ||a|| per image, a the reference's, from the same noise."""

from __future__ import annotations

from ...runtime.compare import relative_l2
from ..result import Metric
from ..statistics import summarize
from . import Case

NEEDS = ("reference",)


def compute(case: Case) -> dict[str, Metric]:
    """Mean over images, with the worst image."""
    assert case.reference is not None
    errors = relative_l2(case.reference.latents, case.samples.latents)
    return {"relative_l2": summarize(errors.tolist(), case.seeds, better="lower")}
