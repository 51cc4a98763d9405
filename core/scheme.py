"""How the numbers of one layer are stored and multiplied: a value, shared by methods, layers, manifest and exports."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from .config import Config

Format = Literal["integer", "nvfp4"]
ActMode = Literal["none", "dynamic", "per-group", "static", "per-step"]
NVFP4_GROUP = 16  # input features per scale
_NAME = re.compile(
    r"w(?P<bits>\d)(a(?P<act_bits>\d))?(-g(?P<group_size>\d+))?(-two-level|-asym|-nvfp4)?"
    r"(-static|-per-step(?P<act_steps>\d+)|-per-group(?P<act_group_size>\d+))?(-offset)?"
    r"(-split(?P<split>\d+))?(-r(?P<rank>\d+))?(-smooth)?(-shifted)?"
)


class Scheme(Config):
    """Number format of one quantized layer.

    A weight row of K input features holds G = K / group_size groups (one group when `group_size` is None). With
    integer codes q, `weight = scale * (q - zero_point)`; symmetric schemes have no zero point and hold two's-complement
    codes. Two-level schemes split the group scale into `scale (per channel, float) * group_scale (small integer)`, so
    that `group_scale * q` is an exact int8 value that rides a full-width integer product.

    NVFP4 codes are 4-bit floats in groups of 16, see runtime/nvfp4.py: `weight = scale (of the tensor) * group_scale
    (E4M3) * value of the code`.
    """

    format: Format = "integer"
    bits: int = Field(ge=2, le=8)
    symmetric: bool = True
    group_size: int | None = Field(None, ge=1)  # input features per scale; None: one scale per output channel
    two_level: bool = False
    act_bits: int = 16  # 4 to 8; 16: activations stay floating point
    # dynamic: one scale per token (linear) or per sample (convolution), found at each call; per-group: one per token
    # and group of features (linear), likewise; static: one fixed scale and zero point for the whole tensor; per-step:
    # the same, another one for each denoiser call of a sampling run
    act_mode: ActMode = "none"
    act_group_size: int | None = Field(None, ge=1)  # per-group: input features per activation scale
    act_offset: bool = False  # dynamic, per-group: each scale comes with a zero point, so that no code is without use
    act_steps: int | None = Field(None, ge=1)  # per-step: denoiser calls of the grid that the table was made on
    split: int | None = Field(None, ge=1)  # input channels of the first of two parts
    rank: int | None = Field(None, ge=1)  # of the low-rank branch; None: there is none
    smooth: bool = False  # inputs are divided by a factor for each channel before everything else
    shifted: bool = False  # a constant is added to what the integers stand for, which then need no sign

    @field_validator("act_bits")
    @classmethod
    def _check_act_bits(cls, act_bits: int) -> int:
        if act_bits != 16 and not 4 <= act_bits <= 8:
            raise ValueError("activations have 4 to 8 bits, or 16, which leaves them floating point")
        return act_bits

    @model_validator(mode="after")
    def _check(self) -> Scheme:
        if (self.act_bits == 16) != (self.act_mode == "none"):
            raise ValueError("act_mode is 'none' exactly when act_bits is 16")
        if (self.act_mode == "per-step") != (self.act_steps is not None):
            raise ValueError("act_steps is given exactly when act_mode is 'per-step'")
        if (self.act_mode == "per-group") != (self.act_group_size is not None):
            raise ValueError("act_group_size is given exactly when act_mode is 'per-group'")
        if self.act_bits < 16 and not self.symmetric:
            raise ValueError("quantized activations need symmetric weights")
        if self.act_offset and (self.shifted or not self.finds_acts):
            raise ValueError("zero points are found where scales are, at each call, of inputs that are not shifted")
        if self.shifted and not (self.finds_acts and self.act_bits < 8 and self.split is None):
            raise ValueError("inputs are shifted where their scales are found at each call, below 8 bits, in one part")
        if self.two_level and (self.bits > 4 or self.group_size is None or not self.symmetric):
            raise ValueError("two-level scales need symmetric groups of at most 4 bits")
        self._check_groups()
        if self.format == "nvfp4" and not self._is_nvfp4:
            raise ValueError(
                "nvfp4 has 4 bits, groups of 16, no zero points and no parts, and floating-point activations"
            )
        return self

    @property
    def _is_nvfp4(self) -> bool:
        fixed = self.bits == 4 and self.group_size == NVFP4_GROUP and self.symmetric and not self.two_level
        return fixed and self.act_bits == 16 and self.split is None

    def _check_groups(self) -> None:
        """Groups of weights and activations against each other, and against the parts."""
        if self.act_group_size is not None:
            if self.two_level or self.group_size not in (None, self.act_group_size):
                raise ValueError(
                    "beside activations per group, weights have a float scale for each of these very groups, or for "
                    "each channel"
                )
        elif self.act_bits < 16 and self.group_size is not None and not self.two_level:
            raise ValueError("a float scale per group cannot ride an integer product; use two_level or per channel")
        for name in ("group_size", "act_group_size"):
            size = getattr(self, name)
            if self.split and size and self.split % size:
                raise ValueError(f"{name} {size} does not divide the first {self.split} channels of a split")

    @property
    def has_fixed_acts(self) -> bool:
        """Whether activation scales are stored; dynamic ones are found at run time."""
        return self.act_mode in ("static", "per-step")

    @property
    def finds_acts(self) -> bool:
        """Whether activation scales are found in what enters, at each call."""
        return self.act_mode in ("dynamic", "per-group")

    @property
    def act_max(self) -> int:
        """Largest integer of an activation whose scale is found at each call; the smallest is its negative, 0 where
        inputs are shifted, one less than its negative where there are zero points."""
        return int(2 ** (self.act_bits - (0 if self.shifted else 1)) - 1)

    @property
    def parts(self) -> int:
        """Parts of input channels with scales of their own."""
        return 1 if self.split is None else 2

    @property
    def absorbs_outliers(self) -> bool:
        """Whether the integers hold less than the weight: its channels have factors, or a part of it is low-rank."""
        return self.smooth or self.rank is not None

    @property
    def plain(self) -> Scheme:
        """The same for integers that hold the whole weight, of inputs as they are."""
        return self.model_copy(update={"rank": None, "smooth": False, "shifted": False})

    @property
    def name(self) -> str:
        """Short name used in files: `w4-g64-asym`, `w8a8`, `w4a8-g64-two-level`, `w8a6-per-step50-split128`,
        `w4a4-g64-per-group64-r32-smooth`, `w4-g16-nvfp4`."""
        acts = f"a{self.act_bits}" if self.act_bits < 16 else ""
        group = f"-g{self.group_size}" if self.group_size else ""
        kind = "-two-level" if self.two_level else "" if self.symmetric else "-asym"
        kind = kind if self.format == "integer" else f"-{self.format}"
        modes = {
            "static": "-static",
            "per-step": f"-per-step{self.act_steps}",
            "per-group": f"-per-group{self.act_group_size}",
        }
        mode = modes.get(self.act_mode, "")
        mode += "-offset" if self.act_offset else ""
        split = f"-split{self.split}" if self.split else ""
        absorbed = (f"-r{self.rank}" if self.rank else "") + ("-smooth" if self.smooth else "")
        absorbed += "-shifted" if self.shifted else ""
        return f"w{self.bits}{acts}{group}{kind}{mode}{split}{absorbed}"

    @classmethod
    def from_name(cls, name: str) -> Scheme:
        """The scheme that has this `name`.

        Raises:
            ValueError: none has.
        """
        found = _NAME.fullmatch(name)
        if found is None:
            raise ValueError(f"{name!r} is not the name of a scheme")
        numbers: dict[str, Any] = {field: int(digits) for field, digits in found.groupdict().items() if digits}
        told: dict[str, ActMode] = {"-static": "static", "-per-step": "per-step", "-per-group": "per-group"}
        rounded: ActMode = next((mode for part, mode in told.items() if part in name), "dynamic")
        return cls(
            format="nvfp4" if "-nvfp4" in name else "integer",
            symmetric="-asym" not in name,
            two_level="-two-level" in name,
            act_mode=rounded if "act_bits" in numbers else "none",
            act_offset="-offset" in name,
            smooth="-smooth" in name,
            shifted="-shifted" in name,
            **numbers,
        )

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest integer code; of integer formats."""
        if self.symmetric:
            return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        return 0, 2**self.bits - 1
