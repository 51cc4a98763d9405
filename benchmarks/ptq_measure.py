"""Sampling and measuring one row of the quantization study.

The first images are compared with the float pipeline's from the same noise. The judge looks at all of them; its
features and answers are kept. Letters: N images or clips, D feature width, Q questions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dacc.core.reporter import Reporter
from dacc.evaluate.judge import Judge, Judged
from dacc.evaluate.metrics import Case, judged_class
from dacc.evaluate.metrics.frechet import frechet_distance, gaussian
from dacc.evaluate.quality import measure_quality, metric_names
from dacc.evaluate.result import Metric
from dacc.runtime.compare import Samples
from dacc.runtime.request import RunRequest
from dacc.runtime.trajectory import sample

RESAMPLES = 200  # of the feature rows
CHUNK = 250  # images that are in memory at once
T = TypeVar("T")


@dataclass(frozen=True)
class Seen:
    """One source's images: those that are paired, and what the judge says of all."""

    paired: Samples
    judged: Judged | None  # of every image, the paired ones first; None without a judge


def part(request: RunRequest, start: int, stop: int) -> RunRequest:
    """The samples [start, stop) of a request, with the labels and prompts that they have in it."""
    turned = {name: _turned(getattr(request, name), start) for name in ("class_labels", "prompts", "negative_prompts")}
    return request.model_copy(update={"seeds": request.seeds[start:stop], **turned})


def look(pipe: Any, request: RunRequest, paired: int, judge: Judge | None, cache: Path, reporter: Reporter) -> Seen:
    """Sample a request; what an earlier call sampled for less images is read from `cache`."""
    seen = read_seen(cache)
    if seen is None or len(seen.paired) != paired:
        first = sample(pipe, part(request, 0, paired), reporter=reporter)
        seen = Seen(first, judge.look(first.images) if judge else None)
        write_seen(cache, seen)
    while judge and seen.judged and len(seen.judged.answers) < len(request.seeds):
        start = len(seen.judged.answers)
        more = sample(pipe, part(request, start, min(start + CHUNK, len(request.seeds))), reporter=reporter)
        seen = Seen(seen.paired, _joined(seen.judged, judge.look(more.images)))
        write_seen(cache, seen)
    return seen


def read_seen(cache: Path) -> Seen | None:
    """What was kept of a source."""
    if not cache.is_file():
        return None
    found = load_file(cache)
    judged = Judged(found["features"], found["answers"]) if "features" in found else None
    return Seen(Samples(found["latents"], found["images"]), judged)


def write_seen(cache: Path, seen: Seen) -> None:
    """Keep it; an interrupted write leaves what was there."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"latents": seen.paired.latents, "images": seen.paired.images}
    if seen.judged:
        tensors |= {"features": seen.judged.features, "answers": seen.judged.answers}
    aside = cache.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside)
    aside.replace(cache)


def measure(
    seen: Seen, reference: Seen | None, request: RunRequest, judge: Judge | None, *, fid_samples: int
) -> dict[str, Metric]:
    """Every figure of a row; `reference` is None for the float pipeline itself.

    Args:
        fid_samples: images for FID and the class judge; 0: the paired images only, and no FID. Clips are all paired,
            and always have their distance.
    """
    paired = part(request, 0, len(seen.paired))
    chosen = [name for name in metric_names(()) if name != "frechet"]
    sets = [reference.paired, seen.paired] if reference else [seen.paired]
    found = measure_quality(sets, paired, judge, chosen)[-1]
    if judge and seen.judged and fid_samples:
        judged = first_of(seen.judged, fid_samples)
        other = first_of(reference.judged, fid_samples) if reference and reference.judged else None
        labels = tuple(_dealt(request.class_labels, fid_samples)) if request.class_labels else None
        case = Case(seen.paired, request.seeds, labels=labels, judge=judge, judged=judged, reference_judged=other)
        found |= judged_class.compute(case) | _distances_of(judged, other, judge, "fid")
    elif judge and judge.clip_reader and seen.judged:
        others = reference.judged if reference else None
        found |= _distances_of(seen.judged, others, judge, "frechet_video")
    return found


def _distances_of(judged: Judged, reference: Judged | None, judge: Judge, name: str) -> dict[str, Metric]:
    """The distance to what is real, and with a reference also how much larger it is than the reference's."""
    found = {name: fid(judged.features, judge)}
    if reference is not None:
        found[f"{name}_ratio"] = fid_ratio(judged.features, reference.features, judge)
    return found


def first_of(judged: Judged, count: int) -> Judged:
    """What was said of the first images."""
    return Judged(judged.features[:count], judged.answers[:count])


def fid(features: Tensor, judge: Judge, *, resamples: int = RESAMPLES) -> Metric:
    """Frechet distance with a bootstrap interval of features (N, D). The reference counts as known.

    Its note says how wide the features lie: damage draws them together, which brings those nearer that lay too wide.
    """
    value, distances = _distances(features, judge, resamples)
    low, high = numpy.percentile(distances, [2.5, 97.5])
    spread = float(gaussian(features)[1].trace() / judge.covariance.trace())
    note = f"total variance of the features: {spread:.3f} times that of real ones"
    return Metric(value=value, low=float(low), high=float(high), count=len(features), better="lower", note=note)


def fid_ratio(features: Tensor, reference: Tensor, judge: Judge, *, resamples: int = RESAMPLES) -> Metric:
    """FID of a row over that of the float pipeline, images of the same noise resampled together (paired bootstrap).

    Both intervals are mostly the luck of the draw of noise, which is the same for both and drops out here.

    Args:
        features: (N, D) of the row.
        reference: (N, D) of the float pipeline, from the same noise in the same order.
    """
    value, distances = _distances(features, judge, resamples)
    float_value, float_distances = _distances(reference, judge, resamples)
    low, high = numpy.percentile(distances / float_distances, [2.5, 97.5])
    return Metric(value=value / float_value, low=float(low), high=float(high), count=len(features), better="lower")


def _distances(features: Tensor, judge: Judge, resamples: int) -> tuple[float, numpy.ndarray]:
    """The distance of features (N, D), and those of resampled ones; rows are picked alike for equal N.

    Resampled images hold fewer different ones, which lifts every distance; so the spread of the resampled distances
    about their own mean is laid about the distance that was measured.
    """
    value = frechet_distance(*gaussian(features), judge.mean, judge.covariance)
    picks = numpy.random.default_rng(0)
    distances = numpy.array(
        [
            frechet_distance(
                *gaussian(features[torch.from_numpy(picks.integers(len(features), size=len(features)))]),
                judge.mean,
                judge.covariance,
            )
            for _ in range(resamples)
        ]
    )
    return value, value + distances - distances.mean()


def _joined(first: Judged, second: Judged) -> Judged:
    return Judged(torch.cat([first.features, second.features]), torch.cat([first.answers, second.answers]))


def _turned(values: tuple[T, ...] | None, start: int) -> tuple[T, ...] | None:
    """Dealt in turn from `start` on."""
    if not values:
        return values
    shift = start % len(values)
    return values[shift:] + values[:shift]


def _dealt(values: tuple[T, ...], count: int) -> list[T]:
    return [values[index % len(values)] for index in range(count)]
