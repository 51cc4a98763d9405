"""What a user can ask of `dacc search-cache`; one name and one default for flag, field and manifest. No torch here."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ..core.cache_plan import BlockRange, DenoiserOutput, ModuleUnit, UnetBody, UnetCut, UnetEncoder, Unit
from ..core.config import Config, build_config
from ..core.errors import ConfigError
from ..core.registry import Registry
from ..core.schedule_id import StepRule

METHODS = Registry("cache search", f"{__package__}.methods", Path(__file__).parent / "methods")
AUTO = "auto"
TRIED = ("deepcache", "taylor", "dp")  # by auto
GIVEN = "ecad"  # the method that takes a schedule from a file
DEFAULT_SPEEDUP = 2.0
DEFAULT_STEPS = 50
UNIT_FORMS = "auto, cut:BLOCK.LAYER, encoder, body, output, blocks:FIRST-END or module:NAME"
# those whose name says all
_NAMED: dict[str, type[UnetEncoder | UnetBody | DenoiserOutput]]
_NAMED = {"encoder": UnetEncoder, "body": UnetBody, "output": DenoiserOutput}


class SearchCacheConfig(Config):
    """The whole request."""

    speedup: float | None = Field(None, gt=1)  # of the denoiser loop in seconds; larger: less like the source
    macs_ratio: float | None = Field(None, gt=0, lt=1)  # of all calls, in its place; smaller: faster
    method: str = "auto"  # a file of cache/methods
    unit: str = "auto"  # what is reused
    steps: int | None = Field(None, ge=2)  # solver steps that the plan is for; None: the zoo's own, else 50
    guidance_scale: float | None = None  # None: the zoo's own, else the pipeline's
    class_labels: tuple[int, ...] | None = None  # None: the zoo's own, else all of the pipeline
    prompts: tuple[str, ...] | None = None  # None: the zoo's own, else a few neutral ones
    negative_prompt: str | tuple[str, ...] | None = None  # several are dealt in turn
    height: int | None = Field(None, ge=1)  # pixels; None: the zoo's own, else the pipeline's
    width: int | None = Field(None, ge=1)
    num_frames: int | None = Field(None, ge=1)  # of clips
    samples: int = Field(8, ge=1)  # runs that are profiled, for methods that look at the model
    batch_size: int = Field(8, ge=1)  # of these runs; larger: faster, more memory
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of these runs, and of the timed ones
    rule: StepRule = "nearest"  # on another grid: follow the noise levels, or refuse
    component: tuple[str, ...] = ()  # empty: all denoisers
    settings: dict[str, Any] = Field(default_factory=dict)  # the method's own fields
    measure: str = "auto"  # auto or never: compare with the source without plan at the end
    seed: int = Field(0, ge=0)

    @field_validator("measure")
    @classmethod
    def _check_measure(cls, value: str) -> str:
        if value not in ("auto", "never"):
            raise ValueError("auto or never")
        return value

    @field_validator("unit")
    @classmethod
    def _check_unit(cls, value: str) -> str:
        for part in value.split(",") if value != "auto" else []:
            parse_unit(part, stacks=("blocks",))
        return value

    @model_validator(mode="after")
    def _check(self) -> SearchCacheConfig:
        if self.speedup is not None and self.macs_ratio is not None:
            raise ValueError("a speed-up and a ratio of MACs are two targets; give one")
        return self

    def methods(self) -> tuple[ModuleType, ...]:
        """The method, or all that auto tries."""
        return tuple(METHODS.load(name) for name in (TRIED if self.method == AUTO else (self.method,)))

    def resolved(self) -> SearchCacheConfig:
        """The same with a target.

        Raises:
            ConfigError: no such method, fields for "auto", or a target for the one that takes a schedule as it is.
        """
        method = self.method
        if method != AUTO:
            METHODS.check(method)
        elif self.settings:
            raise ConfigError(
                f"--set {next(iter(self.settings))} is a field of one method, and auto tries several.",
                mend=f"Name it with --method; auto tries {', '.join(TRIED)}.",
            )
        aimless = self.speedup is None and self.macs_ratio is None
        if method == GIVEN and not aimless:
            raise ConfigError(
                f"--method {GIVEN} takes a schedule as it is and aims at nothing.",
                mend="Leave --speedup and --macs-ratio out.",
            )
        speedup = DEFAULT_SPEEDUP if aimless and method != GIVEN else self.speedup
        return self.model_copy(update={"speedup": speedup})


def needs_of(method: ModuleType, settings: Any) -> tuple[str, ...]:
    """What a method, with these fields, has to know of the model before it chooses; empty: nothing."""
    found: tuple[str, ...] = method.needs(settings) if hasattr(method, "needs") else method.NEEDS
    return found


def wants_reference(method: ModuleType, config: SearchCacheConfig) -> bool:
    """Whether a method, with these settings, compares a quantized network with the float one.

    Raises:
        ConfigError: the method's fields.
    """
    settings = build_config(method.CONFIG, **config.settings)
    return bool(needs_of(method, settings) and getattr(settings, "joint", False))


def parse_unit(text: str, stacks: tuple[str, ...]) -> Unit:
    """The unit that a text names.

    Args:
        stacks: the lists of blocks of the denoiser, for `blocks:FIRST-END`.

    Raises:
        ValueError: another form.
    """
    if text in _NAMED:
        return _NAMED[text](id=text)
    kind, _, where = text.partition(":")
    try:
        if kind == "cut":
            block, _, layer = where.partition(".")
            return UnetCut(id="deep", block=int(block), layer=int(layer or 0))
        if kind == "blocks":
            first, _, end = where.partition("-")
            return BlockRange(id="body", stacks=stacks, first=int(first), end=int(end))
        if kind == "module":
            return ModuleUnit(id=where, path=where)
    except ValueError:
        pass
    raise ValueError(f"{text!r} is none of {UNIT_FORMS}")


def unit_name(unit: Unit) -> str:
    """What `parse_unit` reads as this unit."""
    if isinstance(unit, UnetCut):
        return f"cut:{unit.block}.{unit.layer}"
    if isinstance(unit, BlockRange):
        return f"blocks:{unit.first}-{unit.end}"
    if isinstance(unit, ModuleUnit):
        return f"module:{unit.path}"
    return next(name for name, kind in _NAMED.items() if isinstance(unit, kind))
