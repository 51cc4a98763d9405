"""The manifest `dacc_manifest.json`: what was done to a pipeline and what a loader must do. Nothing here imports torch.

Every model is frozen and refuses unknown keys; free-form additions go under `extra`. Volatile facts (times, host) are
not here but in `dacc_run.json`, so that equal inputs give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from .cache_plan import CacheRecord
from .config import Config, ConfigT
from .errors import BundleError
from .schedule_id import ScheduleId, StepRule
from .scheme import Scheme

MANIFEST_NAME = "dacc_manifest.json"
RUN_NAME = "dacc_run.json"
FORMAT = 1
REQUIRES = {"dacc": "0.1.0", "diffusers": "0.41.0", "torch": "2.9.0"}  # lowest versions that load what is written now
UNHASHED = (MANIFEST_NAME, RUN_NAME, "README.md")  # outside the promise of equal bytes


class FileRecord(Config):
    """One file of the bundle."""

    size: int
    sha256: str


class SourceRecord(Config):
    """Where the first pass of the chain started."""

    name: str  # Hub id, zoo name or folder name; never an absolute path
    revision: str | None = None
    weights: dict[str, str]  # component -> hash of its weight files


class Effect(Config):
    """Difference between the result and the float reference, from the same noise."""

    relative_l2: float | None = None  # of the final latents (or pixels when there are no latents)
    psnr: float | None = None  # dB, images in [0, 1]
    ssim: float | None = None
    seeds: int = 0
    steps: int = 0
    not_measured: str | None = None  # why, where a figure is missing

    def told(self) -> str:
        """For people, on one line."""
        figures = [f"relative L2 {self.relative_l2:.4f}"] if self.relative_l2 is not None else []
        figures += [f"PSNR {self.psnr:.2f} dB"] if self.psnr is not None else []
        figures += [f"SSIM {self.ssim:.4f}"] if self.ssim is not None else []
        if not figures:
            return f"not measured ({self.not_measured})"
        why = f"; {self.not_measured}" if self.not_measured else ""
        return f"{', '.join(figures)} ({self.seeds} seeds, {self.steps} steps){why}"


class PassRecord(Config):
    """One transformation, replayable from its config."""

    command: str
    config: dict[str, Any]
    seed: int
    threads: int
    calibration: str | None = None  # calibration id
    notices: list[str] = Field(default_factory=list)
    effect: dict[str, Effect] = Field(default_factory=dict)  # per component


class ModuleRecord(Config):
    """What happened to one layer: a scheme, or the reason why it was left alone."""

    scheme: str | None = None
    shape: tuple[int, ...] | None = None  # of the float weight, for layers with a scheme: packing pads rows to bytes
    reason: str | None = None
    error: float | None = None  # relative output error for white-noise inputs: ||W - W^|| / ||W|| (Frobenius)
    method: str | None = None  # what rounded it, where that is not the method of the pass
    output_error: float | None = None  # ||(W - W^) x|| / ||W x|| over the inputs x of a calibration set


class StepRecord(Config):
    """The grid that per-step tables were made on, and what they do on another one."""

    schedule: ScheduleId
    rule: StepRule = "nearest"


class AttentionRecord(Config):
    """Both products of attention are rounded at run time; without a record they are floating point."""

    bits: int = Field(ge=4, le=8)  # of q, k and v
    softmax_bits: int = Field(ge=4, le=8)


class QuantizationRecord(Config):
    """Schemes listed once, layers pointing at them."""

    method: str
    schemes: dict[str, Scheme]
    modules: dict[str, ModuleRecord]
    steps: StepRecord | None = None  # for schemes whose act_mode is per-step
    attention: AttentionRecord | None = None  # None: float
    chosen: dict[str, int | float | str] = Field(default_factory=dict)  # what the method decided, e.g. iterations


class ConfigChange(Config):
    """A field of a model's config.json before and after blocks were removed."""

    before: Any = None
    after: Any = None


class PrunedUnit(Config):
    """One part of a denoiser that could be removed, and what is known of it."""

    modules: tuple[str, ...]  # in the source
    parameters: int
    removed: bool = False
    macs: int | None = None  # of one denoiser call of the calibration set; None: not counted
    score: float | None = None  # larger: missed more; None: the method asks for none
    content: float | None = None  # of videos: what single frames lose
    motion: float | None = None  # and what the differences of neighbouring frames lose


class RecoveryRecord(Config):
    """How a pruned component was trained back against the one that it was cut from."""

    steps: int  # updates that were asked for
    steps_done: int
    stopped: Literal["finished", "plateau", "diverged"]  # plateau: calls not trained on gained nothing any more
    trainable: Literal["full", "lora", "difffit"]
    trained_parameters: int  # numbers that were learned; low-rank updates and factors are folded into the weights
    learning_rate: float
    error_before: float  # ||e - e^||^2 / ||e||^2 of the outputs, over calls that were not trained on
    error_after: float  # of the weights that were kept; error_before when training gained nothing
    losses: dict[str, float] = Field(default_factory=dict)  # means over the last check of the training, by name


class PruningRecord(Config):
    """Which blocks of the source are left, and how names of the source lead to them."""

    method: str
    keep: dict[str, tuple[int, ...]]  # list of blocks -> places in the source of those that are left, in their order
    identity_modules: tuple[str, ...] = ()  # modules that the class would build, and that pass their input on
    config: dict[str, ConfigChange] = Field(default_factory=dict)  # fields of config.json that changed
    index_map: dict[str, str] = Field(default_factory=dict)  # module of the source -> its name here, where it differs
    units: dict[str, PrunedUnit] = Field(default_factory=dict)
    parameters_before: int
    parameters_after: int
    error: float | None = None  # relative squared error of the denoiser's outputs without all that was removed
    additivity: float | None = None  # that over the sum of the scores of single units
    recovery: RecoveryRecord | None = None


class ComponentRecord(Config):
    """One treated model of the pipeline."""

    class_name: str
    weight_hash: str
    reference_hash: str  # weight hash of the float component that the chain started from
    parameters: int
    bytes_fp32: int  # 4 bytes for every parameter of the float component
    bytes_before: int  # weight files before the chain
    bytes_after: int  # weight files now
    pruning: PruningRecord | None = None
    quantization: QuantizationRecord | None = None
    cache: CacheRecord | None = None  # plan that the loader installs

    @property
    def has_stale_correction(self) -> bool:
        """Whether what its cache plan corrects was fitted to other weights: those before they were rounded."""
        plan = self.cache.plan if self.cache else None
        return plan is not None and plan.correction is not None and plan.weights != self.weight_hash


class Manifest(Config):
    """The whole file."""

    format: int = FORMAT
    requires: dict[str, str]  # package -> lowest version that loads this bundle
    source: SourceRecord
    pipeline: str
    passes: list[PassRecord]
    history: list[str] = Field(default_factory=list)  # hashes of earlier manifests, oldest first
    components: dict[str, ComponentRecord]
    files: dict[str, FileRecord]
    extra: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def after(
        cls,
        before: Manifest | None,
        passes: Sequence[PassRecord],
        *,
        source: SourceRecord,
        pipeline: str,
        components: Mapping[str, ComponentRecord],
        files: dict[str, FileRecord],
    ) -> Manifest:
        """That of a result: passes after those of its source, components that they did not treat as they were.

        Args:
            before: manifest of the source; None: it is no bundle.
            source: what the chain starts from if it starts here.
            components: those that were treated.
        """
        return cls(
            requires={**REQUIRES, **(before.requires if before else {})},
            source=before.source if before else source,
            pipeline=pipeline,
            passes=[*(before.passes if before else []), *passes],
            history=[*(before.history if before else []), *([before.sha256()] if before else [])],
            components={**(before.components if before else {}), **components},
            files=files,
        )

    def to_json(self) -> str:
        """Canonical text: sorted keys, UTF-8, a newline at the end."""
        return json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    def sha256(self) -> str:
        """Hash of the canonical text; the bundle's identity."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a bundle, or None when the folder is not a bundle.

    Raises:
        BundleError: the file is not JSON, of a newer format, or does not follow the schema.
    """
    file = folder / MANIFEST_NAME
    return read_document(file, Manifest, newest=FORMAT) if file.is_file() else None


def read_document(file: Path, document: type[ConfigT], *, newest: int) -> ConfigT:
    """A JSON document of ours that carries a format number.

    Raises:
        BundleError: the file is not JSON, of a newer format than `newest`, or does not follow the schema.
    """
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file} is not readable JSON ({error}).", mend="Copy its folder again.") from None
    found = raw.get("format") if isinstance(raw, dict) else None
    if not isinstance(found, int):
        raise BundleError(f"{file} has no format number.", mend="Copy its folder again.")
    if found > newest:
        raise BundleError(
            f"{file} has format {found}; this dacc reads up to {newest}.",
            mend="Upgrade: pip install -U dacc-diffusion.",
        )
    try:
        return document(**raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"{file}: {where}: {first['msg']}.", mend="Copy its folder again, or make it anew.") from None
