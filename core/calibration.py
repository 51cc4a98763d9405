"""The record `dacc_calibration.json` of a calibration set: what was run and what was kept. Nothing here imports torch.

Volatile facts (times, host, where the pipeline lay) are not here but in `dacc_run.json`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from operator import eq
from pathlib import Path
from typing import Any

from pydantic import Field

from .config import Config
from .errors import BundleError, ModelError
from .manifest import SourceRecord, read_document
from .schedule_id import ScheduleId

CALIBRATION_NAME = "dacc_calibration.json"
FORMAT = 1


class SampleRecord(Config):
    """One picture of the run."""

    seed: int  # of its noise
    prompt: str | None = None
    negative_prompt: str | None = None
    class_label: int | None = None


class ShardRecord(Config):
    """One file: the kept calls of one batch."""

    file: str
    size: int
    sha256: str
    samples: tuple[int, ...]  # positions in the list of samples
    calls: tuple[int, ...]  # which calls of the run, 0..C-1
    records: dict[str, int]  # component -> denoiser evaluations


class CalibrationRecord(Config):
    """The whole file."""

    format: int = FORMAT
    id: str  # of the set, see `identity`
    request: str  # hash of what was asked for: pipeline, options, dtype
    source: SourceRecord
    pipeline: str
    recipe: dict[str, Any]  # the config with its defaults filled in, and the dtypes
    schedule: ScheduleId
    samples: tuple[SampleRecord, ...]
    branches: dict[str, dict[str, int]]  # component -> guidance branch (cond, uncond, both, none) -> evaluations
    shards: tuple[ShardRecord, ...]
    notices: tuple[str, ...] = Field(default_factory=tuple)

    def to_json(self) -> str:
        """Canonical text: sorted keys, UTF-8, a newline at the end."""
        return json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    def runs(self) -> dict[str, Any]:
        """What its runs were asked for: `steps`, `guidance_scale`, `height`, `width`, `num_frames`, and of `prompts`,
        `negative_prompts` and `class_labels` the fewest that give those of the samples when they are dealt in turn;
        None for what was left to the pipeline."""
        found = {name: self.recipe.get(name) for name in ("steps", "guidance_scale", "height", "width", "num_frames")}
        found["prompts"] = _in_turn([sample.prompt for sample in self.samples])
        found["negative_prompts"] = _in_turn([sample.negative_prompt for sample in self.samples])
        found["class_labels"] = _in_turn([sample.class_label for sample in self.samples])
        return found

    def identity(self) -> str:
        """Hash of recipe and shards, and of all else that the values depend on, but not of the pipeline's name."""
        facts = self.model_dump(mode="json", exclude={"id", "request", "notices"})
        facts["source"] = facts["source"]["weights"]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _in_turn(values: Sequence[Any]) -> tuple[Any, ...] | None:
    if not values or values[0] is None:
        return None
    fewest = next(count for count in range(1, len(values) + 1) if all(map(eq, values, values[count:])))
    return tuple(values[:fewest])


def read_calibration(folder: Path) -> CalibrationRecord | None:
    """The record of a calibration set, or None when the folder is none.

    Raises:
        BundleError: the file is not JSON, of a newer format, or does not follow the schema.
    """
    file = folder / CALIBRATION_NAME
    return read_document(file, CalibrationRecord, newest=FORMAT) if file.is_file() else None


def calibration_id(folder: Path) -> str:
    """The id of the calibration set in a folder.

    Raises:
        ModelError: there is none.
    """
    return calibration_record(folder).id


def calibration_record(folder: Path) -> CalibrationRecord:
    """The record of the calibration set that is in a folder.

    Raises:
        ModelError: there is none.
        BundleError: see `read_calibration`.
    """
    record = read_calibration(folder)
    if record is None:
        raise ModelError(f"{folder} is not a calibration set.", mend="Make one with dacc calibrate.")
    return record


def existing_set(folder: Path, request: str) -> bool:
    """Whether `folder` already holds the whole answer to this very request."""
    try:
        record = read_calibration(folder)
    except BundleError:
        return False
    if record is None or record.request != request:
        return False
    sizes = {shard.file: shard.size for shard in record.shards}
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())
