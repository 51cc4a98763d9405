"""What the judge, a classifier, sees. `class_accuracy`: share of images of the class that was asked for. Where no class
is asked for, `class_agreement`: share of images of the same class as the reference's image from the same noise."""

from __future__ import annotations

from ..result import Metric
from ..statistics import wilson_interval
from . import Case

NEEDS = ("judge",)


def compute(case: Case) -> dict[str, Metric]:
    """A share with Wilson's 95 % interval; nothing for an unconditional reference, which agrees with itself."""
    assert case.judged is not None
    found = case.judged.classes.tolist()
    if case.labels is not None:
        return {"class_accuracy": _share(found, list(case.labels))}
    if case.reference_judged is None:
        return {}
    return {"class_agreement": _share(found, case.reference_judged.classes.tolist())}


def _share(found: list[int], expected: list[int]) -> Metric:
    right, count = sum(a == b for a, b in zip(found, expected, strict=True)), len(found)
    low, high = wilson_interval(right, count)
    return Metric(value=right / count, low=low, high=high, count=count, better="higher")
