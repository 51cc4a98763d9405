"""What the study of pruning compares: pipelines, cuts and rows of `dacc prune`, and its results. Edit here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from dacc.benchmarks.ptq_rows import PIPELINES as IMAGES
from dacc.core.config import Config, Document
from dacc.evaluate.result import Metric

VIDEOS = ("digits-video",)
TRANSFORMERS = ("digits-dit", "shapes-mmdit")
PIPELINES = IMAGES + VIDEOS
RECOVERY = 400  # training steps
Cuts = dict[str, dict[str, Any]]  # name -> options of `dacc prune`
IMAGE_CUTS: Cuts = {
    "15 %": {"ratio": 0.15},
    "30 %": {"ratio": 0.3},
    "30 %, trained": {"ratio": 0.3, "recover": RECOVERY},
}
VIDEO_RECOVERY = {"25 %": 400, "40 %": 2400}  # the latter is a long one
# every training of a cut is equally long, and sees more than the few dozen clips that a set has by default
VIDEO_TRAINING = {"patience": 0, "samples": 160}
# with two clips to an update in place of eight, and a larger rate: more updates in the time
LONGER = {
    "recover": 8000,
    "settings": VIDEO_TRAINING | {"samples": 320, "batch_size": 2, "learning_rate": 1e-3, "cache_gb": 5},
}
VIDEO_CUTS: Cuts = {
    "25 %": {"ratio": 0.25},
    "25 %, trained": {"ratio": 0.25, "recover": VIDEO_RECOVERY["25 %"], "settings": VIDEO_TRAINING},
    "40 %": {"ratio": 0.4},
    "40 %, trained": {"ratio": 0.4, "recover": VIDEO_RECOVERY["40 %"], "settings": VIDEO_TRAINING},
    "40 %, trained longer": {"ratio": 0.4, **LONGER},
}
CUTS = IMAGE_CUTS | VIDEO_CUTS
WHOLE = "whole"


@dataclass(frozen=True)
class Row:
    """One row: a method of `dacc prune` and its fields."""

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    pipelines: tuple[str, ...] = IMAGES


ROWS: dict[str, Row] = {
    "score": Row("score"),
    "block influence": Row("score", {"score": "bi"}),
    "bksdm": Row("bksdm"),
    "tinyfusion": Row("tinyfusion", pipelines=TRANSFORMERS),
    "random": Row("random"),
    "vdmini": Row("vdmini", pipelines=VIDEOS),
    "vdmini (deep)": Row("vdmini", {"deep": True}, pipelines=VIDEOS),  # the negative control
}


def cuts_of(pipeline: str) -> Cuts:
    """The cuts that a pipeline is measured at."""
    return VIDEO_CUTS if pipeline in VIDEOS else IMAGE_CUTS


def cell_options(pipeline: str, cut: str, row: str, recover: int | None = None) -> dict[str, Any]:
    """Options of `dacc prune` for one cell; none for the whole pipeline.

    Args:
        recover: training steps where the cut trains, in place of its own.
    """
    if row == WHOLE:
        return {}
    wanted = cuts_of(pipeline)[cut]
    options = {"method": ROWS[row].method, **wanted, "settings": ROWS[row].settings | wanted.get("settings", {})}
    if recover is not None and "recover" in wanted:
        options["recover"] = recover
    return options


class PruneCell(Config):
    """One row at one cut of one pipeline."""

    pipeline: str
    cut: str  # "-" for the whole pipeline
    row: str
    status: str = "measured"  # or "failed: why"
    fingerprint: str  # of options and request: an equal one is not measured again
    options: dict[str, Any] = Field(default_factory=dict)  # of dacc prune
    metrics: dict[str, Metric] = Field(default_factory=dict)  # against the whole pipeline
    removed: tuple[str, ...] = ()  # units
    parameter_share: float | None = None  # parameters over those of the source
    macs_share: float | None = None  # multiply-accumulates of a run, likewise
    weight_bytes: int | None = None  # of the denoiser's files
    speedup: float | None = None  # of the denoiser loop, medians of interleaved runs
    error_before: float | None = None  # of the outputs, on calls that were not trained on
    error_after: float | None = None
    updates: int | None = None  # of the weights; None: nothing was trained
    training_seconds: float | None = None  # of the processor, over interruptions
    seconds: float | None = None  # of the processor, to prune and train, without what was there before an interruption
    steps: int = 0  # of the solver
    seeds: int = 0
    fid_samples: int = 0  # 0: FID was not measured
    machine: dict[str, str] = Field(default_factory=dict)
    date: str = ""
    commit: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """Its place in the study."""
        return self.pipeline, self.cut, self.row

    @property
    def measured(self) -> bool:
        """Whether it has figures."""
        return self.status == "measured"


class PruneStudy(Document):
    """The whole document."""

    kind: Literal["prune-study"] = "prune-study"
    cells: tuple[PruneCell, ...] = ()

    def find(self, *key: str) -> PruneCell | None:
        """The cell at this place."""
        return next((cell for cell in self.cells if cell.key == key), None)

    def of(self, pipeline: str) -> list[PruneCell]:
        """All cells of a pipeline."""
        return [cell for cell in self.cells if cell.pipeline == pipeline]

    def with_cell(self, cell: PruneCell) -> PruneStudy:
        """The same with this cell in its place; in the order of names, so that a diff shows what changed."""
        others = [one for one in self.cells if one.key != cell.key]
        return PruneStudy(cells=tuple(sorted([*others, cell], key=lambda one: one.key)))
