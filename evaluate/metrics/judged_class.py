"""What the judge, a classifier, sees. `class_accuracy`: share of images of the class that was asked for. Where no class
is asked for, `class_agreement`: share of images of the same class as the reference's image from the same noise."""

from __future__ import annotations

from ..result import Metric
from ..statistics import share
from . import Case

NEEDS = ("judge",)


def compute(case: Case) -> dict[str, Metric]:
    """A share with Wilson's 95 % interval; nothing for an unconditional reference, which agrees with itself, and
    nothing from a judge that answers several questions, none of which is the class."""
    assert case.judged is not None
    if case.judged.answers.shape[1] > 1:
        return {}
    found = case.judged.answers[:, 0].tolist()
    if case.labels is not None:
        return {"class_accuracy": _agreement(found, list(case.labels))}
    if case.reference_judged is None:
        return {}
    return {"class_agreement": _agreement(found, case.reference_judged.answers[:, 0].tolist())}


def why_nothing(case: Case) -> str:
    """Why there is no share."""
    assert case.judged is not None
    if case.judged.answers.shape[1] > 1:
        return "the judge answers several questions, none of which is the class"
    return "no class was asked for, and the reference agrees with itself"


def _agreement(found: list[int], expected: list[int]) -> Metric:
    return share([a == b for a, b in zip(found, expected, strict=True)])
