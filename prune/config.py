"""What a user can ask of `dacc prune`; one name and one default for flag, field and manifest. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from ..calibrate.config import CalibrateConfig
from ..core.config import Config, build_config
from ..core.errors import ConfigError
from ..core.registry import Registry
from .recovery.config import RecoveryConfig
from .settings import MethodConfig
from .stacks import UNETS

METHODS = Registry("pruning method", f"{__package__}.methods", Path(__file__).parent / "methods")
DEFAULT_RATIO = 0.25
KEPT_PROMISE = 0.95  # of the ratio that was asked for must be reached: units are coarse
ALWAYS, OF_TRANSFORMERS, MASKS = "scores", "scores of transformers", "masks"  # what NEEDS of a method may hold
ON_THE_FLY_GB = 4.0
RECOVERY_SAMPLES, RECOVERY_TIMESTEPS = 64, 16  # at least, of a set that is trained on and made on the fly


class PruneConfig(Config):
    """The whole request."""

    ratio: float | None = Field(None, gt=0, lt=1)  # share of the parameters to remove; larger: smaller, less alike
    method: str = "score"  # a file of prune/methods
    recover: int = Field(0, ge=0)  # training steps of the rest; 0: none
    strict_config: bool = False  # only what plain diffusers loads without dacc
    allow_adjacent: bool = False  # neighbouring blocks may both go
    component: tuple[str, ...] = ()  # empty: all denoisers
    settings: dict[str, Any] = Field(default_factory=dict)  # fields of the method, and of recovery
    measure: str = "auto"  # auto or never: compare with the source at the end
    seed: int = Field(0, ge=0)

    @field_validator("measure")
    @classmethod
    def _check_measure(cls, value: str) -> str:
        if value not in ("auto", "never"):
            raise ValueError("auto or never")
        return value

    def resolved(self) -> PruneConfig:
        """The same with the ratio filled in, for methods that need one.

        Raises:
            ConfigError: no such method.
        """
        needed = METHODS.fact(self.method, "NEEDS_RATIO", False)
        return self.model_copy(update={"ratio": DEFAULT_RATIO if self.ratio is None and needed else self.ratio})

    def of_method(self) -> MethodConfig:
        """The method's own fields.

        Raises:
            ConfigError: a field that neither it nor recovery has.
        """
        own = {name: value for name, value in self.settings.items() if name not in RecoveryConfig.model_fields}
        settings: MethodConfig = build_config(METHODS.load(self.method).CONFIG, **own)
        return settings

    def of_recovery(self) -> RecoveryConfig:
        """How what is left is trained; with 0 steps not at all.

        Raises:
            ConfigError: a value is out of range, or there is a field although nothing is trained.
        """
        fields = {name: value for name, value in self.settings.items() if name in RecoveryConfig.model_fields}
        if "steps" in fields:
            raise ConfigError("--set steps is what --recover sets.", mend=f"Give --recover {fields['steps']}.")
        if fields and not self.recover:
            raise ConfigError(
                f"--set {next(iter(fields))} is about training, and nothing is trained.",
                mend="Add --recover STEPS, or leave it out.",
            )
        return build_config(RecoveryConfig, steps=self.recover, **fields)

    def scores(self, class_name: str) -> bool:
        """Whether the method judges the units of this class of denoisers, for which it needs a calibration set."""
        needs = METHODS.fact(self.method, "NEEDS", ())
        return ALWAYS in needs or MASKS in needs or (OF_TRANSFORMERS in needs and class_name not in UNETS)


def on_the_fly(config: PruneConfig, settings: MethodConfig, components: Iterable[str]) -> CalibrateConfig:
    """The calibration set that is made when one is needed and none is given; larger where something is trained."""
    least = (RECOVERY_SAMPLES, RECOVERY_TIMESTEPS) if config.recover else (1, 1)
    return CalibrateConfig(
        strategy="uniform",
        samples=max(settings.samples, least[0]),
        timesteps=max(settings.timesteps, least[1]),
        batch_size=settings.batch_size,
        component=tuple(components),
        seed=config.seed,
        budget_gb=ON_THE_FLY_GB,
    )
