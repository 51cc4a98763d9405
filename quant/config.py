"""What a user can ask of `dacc quantize`; one name and one default for flag, field and manifest key. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ..calibrate.config import CalibrateConfig
from ..core.config import Config

DATA_FREE = ("rtn",)  # methods without NEEDS, told here so that knowing it imports nothing heavy
ON_THE_FLY_GB = 1.0


class QuantizeConfig(Config):
    """The whole request; equal configs on equal sources give equal bytes."""

    bits: int = Field(4, ge=2, le=8)  # weight bits; fewer: smaller file, worse image
    act_bits: Literal[16, 8, 4] = 16  # activation bits; 8 runs on integer products and is faster
    act_mode: Literal["auto", "dynamic"] = "auto"  # auto: what the method is made for
    method: str = "auto"  # a file of quant/methods
    group_size: int | Literal["auto", "channel"] = (
        "auto"  # input features per scale; smaller: better image, larger file
    )
    symmetric: bool | Literal["auto"] = "auto"  # auto: zero points for grouped weight-only, none else
    include: tuple[str, ...] = ()  # globs over layer names; empty: all
    exclude: tuple[str, ...] = ()  # globs over layer names that stay float
    layer_bits: tuple[tuple[str, int], ...] = ()  # (glob, bits); 16 leaves the layer float; the last match wins
    component: tuple[str, ...] = ()  # empty: all denoisers
    settings: dict[str, Any] = Field(default_factory=dict)  # the method's own fields
    measure: Literal["auto", "never"] = "auto"  # compare with the float pipeline at the end
    seed: int = 0

    @field_validator("group_size")
    @classmethod
    def _check_group_size(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("a group holds at least one value")
        return value

    @field_validator("layer_bits")
    @classmethod
    def _check_layer_bits(cls, value: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
        for glob, bits in value:
            if bits != 16 and not 2 <= bits <= 8:
                raise ValueError(f"{glob}={bits}: bits are 2 to 8, or 16 to leave a layer float")
        return value

    @model_validator(mode="after")
    def _check_combination(self) -> QuantizeConfig:
        if self.act_bits < 16 and self.symmetric is False:
            raise ValueError("asymmetric weights cannot ride an integer product; drop --asymmetric or --act-bits")
        if self.act_bits < 16 and self.bits > 4 and isinstance(self.group_size, int):
            raise ValueError(
                "with quantized activations, weights of more than 4 bits are per channel; drop --group-size"
            )
        return self


def on_the_fly(components: Iterable[str], seed: int) -> CalibrateConfig:
    """The calibration set that is made when a method needs one and none is given."""
    return CalibrateConfig(component=tuple(components), seed=seed, budget_gb=ON_THE_FLY_GB)
