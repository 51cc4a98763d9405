"""What a user can ask of `dacc quantize`; one name and one default for flag, field and manifest key. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError, field_validator, model_validator

from ..calibrate.config import CalibrateConfig
from ..core.config import Config
from ..core.errors import ConfigError
from ..core.registry import Registry
from ..core.scheme import NVFP4_GROUP
from ..core.target import HERE, find_target

METHODS = Registry("quantization method", f"{__package__}.methods", Path(__file__).parent / "methods")
FIXED_MODES = ("static", "per-step")  # activation scales that are found on a calibration set
FAST_BITS = 8  # of activations: fewer are no faster in an integer product
ON_THE_FLY_GB = 1.0
DEFAULT_METHOD = "rtn"  # the one that needs no calibration set


class QuantizeConfig(Config):
    """The whole request; equal configs on equal sources give equal bytes, unless a method is left to choose how long it
    learns."""

    format: Literal["integer", "nvfp4"] = "integer"  # of weights; nvfp4: 4-bit floats with scales of 8 bits, in linears
    bits: int = Field(4, ge=2, le=8)  # weight bits; fewer: smaller file, worse image
    act_bits: int = 16  # activation bits, 4 to 8, or 16: float; 8 runs on integer products and is faster
    # auto: what the method is made for
    act_mode: Literal["auto", "dynamic", "per-group", "static", "per-step"] = "auto"
    # of activation scales that are found at each call: without or with zero points. auto: with, but for groups below 8
    # bits, which fused 4-bit kernels take without
    act_symmetric: bool | Literal["auto"] = "auto"
    attention_bits: int = 16  # of q, k and v in the products of attention, 4 to 8, simulated; 16: float
    method: str = "auto"  # a file of quant/methods
    group_size: int | Literal["auto", "channel"] = (
        "auto"  # input features per scale; smaller: better image, larger file
    )
    symmetric: bool | Literal["auto"] = "auto"  # auto: zero points for grouped weight-only, none else
    include: tuple[str, ...] = ()  # globs over layer names; empty: all
    exclude: tuple[str, ...] = ()  # globs over layer names that stay float
    layer_bits: tuple[tuple[str, int], ...] = ()  # (glob, bits); 16 leaves the layer float; the last match wins
    layer_act_bits: tuple[tuple[str, int], ...] = ()  # likewise for activations, where they are quantized at all
    component: tuple[str, ...] = ()  # empty: all denoisers
    settings: dict[str, Any] = Field(default_factory=dict)  # the method's own fields
    # what the calls of a calibration set may hold, in front of the units too, on the disk where memory is short; less:
    # fewer calls
    cache_gb: FiniteFloat = Field(4.0, gt=0)
    target: str = HERE  # machine that the result is to run on; changes what is said, not what is written
    measure: Literal["auto", "never"] = "auto"  # compare with the float pipeline at the end
    seed: int = Field(0, ge=0)

    @field_validator("group_size")
    @classmethod
    def _check_group_size(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("a group holds at least one value")
        return value

    @field_validator("act_bits")
    @classmethod
    def _check_act_bits(cls, value: int) -> int:
        if value != 16 and not 4 <= value <= 8:
            raise ValueError(f"activations of {value} bits: 4 to 8, or 16 to leave them float")
        return value

    @field_validator("attention_bits")
    @classmethod
    def _check_attention_bits(cls, value: int) -> int:
        if value != 16 and not 4 <= value <= 8:
            raise ValueError(f"attention of {value} bits: 4 to 8, or 16 to leave its products float")
        return value

    @field_validator("layer_bits")
    @classmethod
    def _check_layer_bits(cls, value: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
        for glob, bits in value:
            if bits != 16 and not 2 <= bits <= 8:
                raise ValueError(f"{glob}={bits}: bits are 2 to 8, or 16 to leave a layer float")
        return value

    @field_validator("layer_act_bits")
    @classmethod
    def _check_layer_act_bits(cls, value: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
        for glob, bits in value:
            if bits != 16 and not 4 <= bits <= 8:
                raise ValueError(f"{glob}={bits}: activation bits are 4 to 8, or 16 to leave them float")
        return value

    @model_validator(mode="after")
    def _check_combination(self) -> QuantizeConfig:
        if self.layer_act_bits and self.act_bits == 16:
            raise ValueError("activation bits of some layers need --act-bits for the others")
        if self.act_symmetric != "auto" and self.act_bits == 16:
            raise ValueError("zero points of activations need --act-bits")
        if self.act_bits < 16 and self.symmetric is False:
            raise ValueError("asymmetric weights cannot ride an integer product; drop --asymmetric or --act-bits")
        if self.act_bits < 16 and self.bits > 4 and isinstance(self.group_size, int):
            raise ValueError(
                "with quantized activations, weights of more than 4 bits are per channel; drop --group-size"
            )
        if self.format == "nvfp4" and self.bits != 4:
            raise ValueError(f"nvfp4 has 4 bits, not {self.bits}; drop --bits or --format")
        if self.format == "nvfp4" and self.act_bits < 16:
            raise ValueError("beside nvfp4 weights activations stay float; drop --act-bits or --format")
        if self.format == "nvfp4" and (self.group_size not in ("auto", NVFP4_GROUP) or self.symmetric is False):
            raise ValueError(
                "nvfp4 has groups of 16 and no zero points; drop --group-size and --asymmetric, or --format"
            )
        return self

    def resolved(self) -> QuantizeConfig:
        """The same with the method's name and its way to activation scales in place of "auto", and one name for a
        target.

        Raises:
            ConfigError: no such method or target, one without this format, or a mode of activations that are not
                quantized.
        """
        method = DEFAULT_METHOD if self.method == "auto" else self.method
        METHODS.check(method)
        if self.format not in METHODS.fact(method, "FORMATS", ("integer",)):
            able = [name for name in METHODS.names() if self.format in METHODS.fact(name, "FORMATS", ())]
            raise ConfigError(
                f"{method} has no {self.format} weights.",
                "It is made for integers.",
                f"Use --method {' or '.join(able)}.",
            )
        if self.act_bits == 16 and self.act_mode != "auto":
            raise ConfigError(
                f"--act-mode {self.act_mode} is about quantized activations; these are float.",
                mend="Add --act-bits 8, or leave --act-mode out.",
            )
        mode = _made_for(method, self.act_bits) if self.act_mode == "auto" and self.act_bits < 16 else self.act_mode
        target = HERE if self.target == HERE else find_target(self.target).name
        return self.model_copy(update={"method": method, "act_mode": mode, "target": target})

    @property
    def is_data_free(self) -> bool:
        """Whether a method that looks at inputs is asked to do without; of a resolved config."""
        field = METHODS.fact(self.method, "WITHOUT_DATA")
        try:
            return bool(TypeAdapter(bool).validate_python(self.settings.get(field, False)))
        except ValidationError:  # the method's own config will say what is wrong
            return False

    @property
    def needs_calibration(self) -> bool:
        """Whether anything about the inputs of the layers has to be known; of a resolved config."""
        if self.is_data_free:
            return False
        return bool(METHODS.fact(self.method, "NEEDS", ())) or self.act_mode in FIXED_MODES


def _made_for(method: str, act_bits: int) -> str:
    """The way to activation scales that a method is made for."""
    usual = METHODS.fact(method, "ACT_MODE")
    return str(METHODS.fact(method, "FEW_BITS_ACT_MODE", usual) if act_bits < FAST_BITS else usual)


def on_the_fly(config: QuantizeConfig, components: Iterable[str]) -> CalibrateConfig:
    """The calibration set that is made when a resolved config needs one and none is given."""
    strategy = METHODS.fact(config.method, "CALIBRATION", "uniform")
    if config.act_mode == "per-step":
        strategy = "every-step"
    return CalibrateConfig(
        strategy=strategy,
        samples=METHODS.fact(config.method, "SAMPLES", 32),
        component=tuple(components),
        seed=config.seed,
        budget_gb=ON_THE_FLY_GB,
    )
