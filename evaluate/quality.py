"""Quality of samples: every metric that applies, the reference first."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypeVar

from ..core.zoo import ZooEntry
from ..runtime.compare import Samples
from ..runtime.request import RunRequest
from . import metrics
from .judge import Judge, load_judge
from .result import Metric

T = TypeVar("T")
LACKS = {  # what a metric cannot do without -> why there is none
    "reference": "there is no other source to compare with the reference",
    "prompts": "the samples have no prompts",
}


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
    samples: Sequence[Samples],
    request: RunRequest,
    judge: Judge | None,
    chosen: Sequence[str] = (),
    *,
    expected: Collection[str] = (),
    absent: list[str] | None = None,
) -> list[dict[str, Metric]]:
    """Metric name -> value for every set of samples; the first set is the reference of the others.

    Args:
        samples: all from the same noise.
        request: what they were sampled with.
        judge: None leaves the metrics out that need one.
        chosen: metric files; empty: all.
        expected: those of them that get a line in `absent` when they say nothing of any source; that there is no judge
            is told by `find_judge`.
    """
    reasons: dict[str, str] = {}  # of metrics that say nothing of a source: why, of the last one
    told: set[str] = set()  # metrics that say something of a source
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
            found, reasons[name] = _measure(name, case)
            if found:
                told.add(name)
            result |= found
        results.append(result)
    if absent is not None:
        absent += [f"{name}: {why}." for name, why in reasons.items() if why and name in expected and name not in told]
    return results


def _measure(name: str, case: metrics.Case) -> tuple[dict[str, Metric], str]:
    """What a metric says of a source; nothing, and why, where it has nothing to say."""
    metric = metrics.REGISTRY.load(name)
    if missing := [need for need in metric.NEEDS if getattr(case, need) is None]:
        return {}, LACKS.get(missing[0], "")
    found: dict[str, Metric] = metric.compute(case)
    return found, "" if found else metric.why_nothing(case)


def _dealt(values: tuple[T, ...] | None, count: int) -> tuple[T, ...] | None:
    """One value for every sample, in turn."""
    return tuple(values[index % len(values)] for index in range(count)) if values else None
