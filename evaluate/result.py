"""What `evaluate` and `inspect` answer: plain values, ready for JSON. Units live in the names.
Nothing here imports torch."""

from __future__ import annotations

from typing import Literal

from ..core.config import Config, Document


class Metric(Config):
    """One number about a set of images."""

    value: float  # the mean over images, or the number of the whole set
    low: float | None = None  # 95 % interval; None where there is none
    high: float | None = None
    worst: float | None = None  # of a single image
    worst_seed: int | None = None  # the seed of that image
    count: int  # images
    better: Literal["lower", "higher"]
    note: str | None = None  # what to keep in mind


class ComponentSize(Config):
    """Room that one denoiser, or another component that was treated, takes."""

    class_name: str
    parameters: int  # weights that the model stands for, however they are packed
    bytes_on_disk: int  # its weight files
    bytes_in_memory: int  # weights, scales and unpacked copies after one run


class Speed(Config):
    """Wall-clock time, measured in turns with the other sources in one process."""

    seconds_per_image: float  # median over repeats
    seconds_low: float  # fastest and slowest repeat
    seconds_high: float
    speedup: float | None = None  # reference's time over this one's, median over repeats; None for the reference
    speedup_low: float | None = None
    speedup_high: float | None = None
    repeats: int
    batch_size: int
    steps: int


class Memory(Config):
    """Resident memory of a fresh process that loads the source and generates one batch."""

    peak_bytes: int  # highest, with interpreter and libraries
    baseline_bytes: int  # after importing the libraries, before loading
    device_peak_bytes: int | None = None  # allocated on the accelerator at most; None on a CPU


class SourceReport(Config):
    """One source."""

    name: str
    identity: str  # zoo:NAME, Hub id or folder name
    is_reference: bool
    pipeline: str
    metrics: dict[str, Metric]
    components: dict[str, ComponentSize]
    speed: Speed | None = None
    memory: Memory | None = None


class Settings(Config):
    """Everything that the numbers depend on."""

    num: int
    steps: int
    guidance_scale: float | None
    labels: tuple[int, ...] | None
    prompts: tuple[str, ...] | None
    negative_prompt: str | None = None
    height: int | None = None  # pixels; None: the pipeline's default
    width: int | None = None
    num_frames: int | None = None  # of a clip; None: the pipeline's default, or it makes images
    seed: int
    batch_size: int
    scheduler: str
    schedule_id: str
    device: str
    dtype: str
    threads: int


class Evaluation(Document):
    """Sources side by side, the reference first."""

    settings: Settings
    sources: tuple[SourceReport, ...]
    judge: str | None = None
    judge_fid_between_halves: float | None = None  # distance of real images to real images: about the least to expect
    absent: tuple[str, ...] = ()  # what was not measured, and why
    files: tuple[str, ...] = ()  # what was written: names inside the output folder

    @property
    def reference(self) -> SourceReport:
        """The source that the others are compared with."""
        return self.sources[0]
