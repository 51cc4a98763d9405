"""What to run and how much of it to keep. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, FiniteFloat, SerializerFunctionWrapHandler, model_serializer, model_validator

from ..core.config import Config, build_config
from ..core.errors import ConfigError
from ..core.registry import Registry
from ..core.zoo import ZooEntry

STRATEGIES = Registry(
    "calibration strategy", f"{__package__}.strategies", Path(__file__).parent / "strategies", dashed=True
)
DEFAULT_STEPS = 50


class CalibrateConfig(Config):
    """Options of a calibration run. Prompts and classes are dealt to the samples in turn."""

    strategy: str = "uniform"  # which calls are kept: a file of calibrate/strategies
    timesteps: int | None = Field(None, ge=1)  # calls kept of each run, for strategies that take it; None: theirs
    samples: int = Field(32, ge=1)  # pictures; more: better statistics, longer, larger set
    steps: int | None = Field(None, ge=1)  # solver steps; None: the zoo's own, else 50
    guidance_scale: FiniteFloat | None = None  # None: the zoo's own, else the pipeline's
    class_labels: tuple[int, ...] | None = None  # None: all classes in turn
    prompts: tuple[str, ...] | None = None  # None: the zoo's calibration prompts, else a few neutral ones
    images: Path | None = None  # a folder of pictures that take the place of what runs would draw; NAME.txt: captions
    negative_prompt: str | tuple[str, ...] | None = None  # what guidance leads away from; several are dealt in turn
    height: int | None = Field(None, ge=1)  # pixels; None: the zoo's own, else the pipeline's default
    width: int | None = Field(None, ge=1)
    num_frames: int | None = Field(None, ge=1)  # of a clip; None: the zoo's own, else the pipeline's default
    batch_size: int = Field(8, ge=1)  # samples of one pipeline call and of one record; larger: faster, more memory
    store_dtype: Literal["as-is", "bfloat16", "float16"] = "as-is"  # of large float tensors; 16 bits: half the size
    budget_gb: FiniteFloat = Field(4.0, gt=0)  # the set may take; fewer samples are run where it would take more
    component: tuple[str, ...] = ()  # empty: all denoisers
    seed: int = Field(0, ge=0)  # another seed: other noise
    settings: dict[str, Any] = Field(default_factory=dict)  # the strategy's own fields

    @model_validator(mode="after")
    def _check(self) -> CalibrateConfig:
        if () in (self.class_labels, self.prompts, self.negative_prompt):
            raise ValueError("class_labels, prompts and negative_prompt must not be empty")
        return self

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the field that came later, where it says nothing: so requests keep their hash."""
        return {name: value for name, value in write(self).items() if name != "images" or value is not None}

    def resolved(self, entry: ZooEntry | None) -> CalibrateConfig:
        """The same with everything filled in that a zoo pipeline or the strategy knows.

        Raises:
            ConfigError: no such strategy, or one without these fields.
            ModelError: the zoo pipeline's list of prompts is missing or damaged.
        """
        found: dict[str, Any] = {"settings": self.strategy_config().model_dump(mode="json")}
        found["timesteps"] = found["settings"].pop("timesteps", None)
        if entry:
            found["guidance_scale"] = self.guidance_scale if self.guidance_scale is not None else entry.guidance_scale
            found["class_labels"] = self.class_labels or entry.class_labels or None
            found["prompts"] = self.prompts or entry.calibration_prompts or None
            found |= {name: getattr(self, name) or getattr(entry, name) for name in ("height", "width", "num_frames")}
        found["steps"] = self.steps or (entry.num_inference_steps if entry else DEFAULT_STEPS)
        return self.model_copy(update=found)

    def strategy_config(self) -> Any:
        """The strategy's own config; `timesteps` is one of its fields."""
        fields = STRATEGIES.load(self.strategy).CONFIG
        given = dict(self.settings)
        if self.timesteps is not None:
            if "timesteps" not in fields.model_fields:
                raise ConfigError(
                    f"--timesteps does not go with --strategy {self.strategy}, which chooses the calls itself.",
                    mend="Leave it out, or use --strategy uniform.",
                )
            given["timesteps"] = self.timesteps
        return build_config(fields, **given)
