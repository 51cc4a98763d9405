"""Quality of samples: every metric that applies, the reference first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from ..core.zoo import ZooEntry
from ..runtime.compare import Samples
from ..runtime.request import RunRequest
from . import metrics
from .judge import Judge, load_judge
from .result import Metric

T = TypeVar("T")


def metric_names(wanted: tuple[str, ...]) -> list[str]:
    """The wanted metrics, or all of them.

    Raises:
        ConfigError: an unknown name, before anything is loaded.
    """
    for name in wanted:
        metrics.REGISTRY.check(name)
    return list(wanted) or metrics.REGISTRY.names()


def find_judge(entry: ZooEntry | None, chosen: list[str], samples: Samples, absent: list[str]) -> Judge | None:
    """The judge, when a chosen metric needs one and there is one for these images; otherwise a line in `absent`."""
    wanting = [name for name in chosen if "judge" in metrics.REGISTRY.load(name).NEEDS]
    if not wanting:
        return None
    judge = load_judge(entry) if entry else None
    if judge is None:
        absent.append(f"{', '.join(wanting)}: only installed zoo pipelines, and what was made from them, have a judge.")
    elif not judge.fits(samples.images):
        size = " x ".join(map(str, judge.facts["input_size"]))
        absent.append(f"{', '.join(wanting)}: the judge {judge.name} knows images of {size} only.")
        return None
    return judge


def measure_quality(
    samples: Sequence[Samples], request: RunRequest, judge: Judge | None, chosen: Sequence[str] = ()
) -> list[dict[str, Metric]]:
    """Metric name -> value for every set of samples; the first set is the reference of the others.

    Args:
        samples: all from the same noise.
        request: what they were sampled with.
        judge: None leaves the metrics out that need one.
        chosen: metric files; empty: all.
    """
    judged = [judge.look(one.images) if judge else None for one in samples]
    results: list[dict[str, Metric]] = []
    for index, (own, seen) in enumerate(zip(samples, judged, strict=True)):
        case = metrics.Case(
            samples=own,
            seeds=request.seeds,
            labels=_dealt(request.class_labels, len(request.seeds)),
            prompts=_dealt(request.prompts, len(request.seeds)),
            reference=samples[0] if index else None,
            judge=judge,
            judged=seen,
            reference_judged=judged[0] if index else None,
        )
        result: dict[str, Metric] = {}
        for name in chosen or metrics.REGISTRY.names():
            metric = metrics.REGISTRY.load(name)
            if all(getattr(case, need) is not None for need in metric.NEEDS):
                result |= metric.compute(case)
        results.append(result)
    return results


def _dealt(values: tuple[T, ...] | None, count: int) -> tuple[T, ...] | None:
    """One value for every sample, in turn."""
    return tuple(values[index % len(values)] for index in range(count)) if values else None
