"""The results of the quantization study as one JSON document, written after every cell. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
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


def read_study(file: Path, kind: Any = Study) -> Any:
    """The document, or an empty one of its kind where there is none yet."""
    return kind.model_validate_json(file.read_text(encoding="utf-8")) if file.is_file() else kind()


def record_cell(file: Path, cell: Any, kind: Any = Study) -> None:
    """Put one cell into the document; several runs of a study may share it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):
        write_study(file, read_study(file, kind).with_cell(cell))


def write_study(file: Path, study: Any) -> None:
    """Written aside and renamed: an interrupted study leaves the one before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    text = json.dumps(
        study.model_dump(mode="json", exclude_defaults=True) | {"schema": 1, "kind": study.kind}, indent=1
    )
    aside.write_text(text + "\n", encoding="utf-8")
    aside.replace(file)


def fingerprint(**facts: Any) -> str:
    """Short hash of everything that a cell's figures follow from."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def is_finished(cell: Cell | None, wanted: str, fid_samples: int, *, only_missing: bool = False) -> bool:
    """Whether nothing is left to measure.

    Args:
        wanted: the fingerprint of what is asked for now.
        fid_samples: images that FID is asked for from; a cell with more is as good.
        only_missing: anything on record will do, also a failure and what was asked for differently.
    """
    if cell is None:
        return False
    if only_missing:
        return True
    return cell.measured and cell.fingerprint == wanted and cell.fid_samples >= fid_samples
