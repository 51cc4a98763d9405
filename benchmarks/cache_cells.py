"""The results of the study of cache plans as one JSON document, written after every cell. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from dacc.core.config import Config, Document
from dacc.evaluate.result import Metric


class CacheCell(Config):
    """One row at one target on one pipeline, float or quantized."""

    pipeline: str
    source: str  # float, W8A8, ...
    target: str  # 2x; "-" without a plan
    row: str
    status: str = "measured"  # or "failed: why"
    fingerprint: str  # of options and request: an equal one is not measured again
    options: dict[str, Any] = Field(default_factory=dict)  # of dacc search-cache, or steps and solver
    metrics: dict[str, Metric] = Field(default_factory=dict)  # against the float pipeline without a plan
    macs_ratio: float | None = None  # of a run, over one of the full steps without a plan
    speedup: float | None = None  # of the denoiser loop, likewise, medians of interleaved runs
    codes: dict[str, str] = Field(default_factory=dict)
    strength: str = ""  # interval or threshold of another library's cache
    seconds: float | None = None  # of the processor, to search
    steps: int = 0  # of the solver in full
    seeds: int = 0
    fid_samples: int = 0  # 0: FID was not measured
    machine: dict[str, str] = Field(default_factory=dict)
    date: str = ""
    commit: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Its place in the study."""
        return self.pipeline, self.source, self.target, self.row

    @property
    def measured(self) -> bool:
        """Whether it has figures."""
        return self.status == "measured"


class CacheStudy(Document):
    """The whole document."""

    kind: Literal["cache-study"] = "cache-study"
    cells: tuple[CacheCell, ...] = ()

    def find(self, *key: str) -> CacheCell | None:
        """The cell at this place."""
        return next((cell for cell in self.cells if cell.key == key), None)

    def of(self, pipeline: str) -> list[CacheCell]:
        """All cells of a pipeline."""
        return [cell for cell in self.cells if cell.pipeline == pipeline]

    def with_cell(self, cell: CacheCell) -> CacheStudy:
        """The same with this cell in its place; in the order of names, so that a diff shows what changed."""
        others = [one for one in self.cells if one.key != cell.key]
        return CacheStudy(cells=tuple(sorted([*others, cell], key=lambda one: one.key)))
