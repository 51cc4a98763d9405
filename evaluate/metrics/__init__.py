"""One metric per file. A file holds `NEEDS` and `compute(case) -> {name: Metric}`; its name is the name to ask for.
Where `compute` may give nothing, `why_nothing(case)` says why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ...core.registry import Registry
from ...runtime.compare import Samples

if TYPE_CHECKING:
    from ..judge import Judge, Judged

REGISTRY = Registry("metric", __name__, Path(__file__).parent)
Need = Literal["reference", "judge", "prompts"]  # what a metric cannot do without


@dataclass(frozen=True)
class Case:
    """Everything that a metric may look at: one source's images and the reference's from the same noise."""

    samples: Samples
    seeds: tuple[int, ...]
    labels: tuple[int, ...] | None = None  # class of every image, for class-conditional pipelines
    prompts: tuple[str, ...] | None = None  # prompt of every image, where prompts were given
    reference: Samples | None = None  # None when this source is the reference
    judge: Judge | None = None
    judged: Judged | None = None  # what the judge says of `samples`
    reference_judged: Judged | None = None  # and of `reference`
