"""The results of the quantization study as one JSON document. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from dacc.core.config import Config, Document
from dacc.evaluate.result import Metric

FLOAT_SETTING, FLOAT_ROW = "float", "full precision"


class Cell(Config):
    """One row at one setting on one pipeline."""

    pipeline: str
    setting: str  # W4A8; "float" for the float pipeline
    row: str
    peer: bool = False
    status: str = "measured"  # or "failed: why", "cannot run: why" for peers
    fingerprint: str  # of options and request: an equal one is not measured again
    options: dict[str, Any] = Field(default_factory=dict)  # of dacc quantize; of a peer its format and version
    calibration: str | None = None  # strategy of the set that was given
    metrics: dict[str, Metric] = Field(default_factory=dict)
    steps: int = 0  # of the solver
    seeds: int = 0  # paired with the float pipeline's
    fid_samples: int = 0  # 0: FID was not measured
    bytes_per_float32: float | None = None
    seconds: float | None = None  # of the processor, to quantize; the calibration set not counted
    calibration_seconds: float | None = None
    peak_bytes: int | None = None  # resident, of the process that quantized
    layers: str | None = None  # hash of layer names and weight bits; equal where the same layers were quantized
    weight_share: float | None = None  # of a peer: parameters in layers with quantized weights
    input_share: float | None = None  # and in layers that really round their inputs
    notice: str | None = None
    machine: dict[str, str] = Field(default_factory=dict)
    date: str = ""
    commit: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """Its place in the study."""
        return self.pipeline, self.setting, self.row

    @property
    def measured(self) -> bool:
        """Whether it has figures."""
        return self.status == "measured"


class Study(Document):
    """The whole document."""

    kind: Literal["ptq-study"] = "ptq-study"
    cells: tuple[Cell, ...] = ()

    def find(self, pipeline: str, setting: str, row: str) -> Cell | None:
        """The cell at this place."""
        return next((cell for cell in self.cells if cell.key == (pipeline, setting, row)), None)

    def of(self, pipeline: str) -> list[Cell]:
        """All cells of a pipeline."""
        return [cell for cell in self.cells if cell.pipeline == pipeline]

    def with_cell(self, cell: Cell) -> Study:
        """The same with this cell in its place; in the order of names, so that a diff shows what changed."""
        others = [one for one in self.cells if one.key != cell.key]
        return Study(cells=tuple(sorted([*others, cell], key=lambda one: one.key)))
