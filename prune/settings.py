"""Fields of `--set` that all methods share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from ..core.config import Config

Score = Literal["out_mse", "bi", "inout_mse", "taylor"]


class MethodConfig(Config):
    """What is looked at to judge units, for methods that do; and to train what is left, then at least 64 and 16."""

    samples: int = Field(16, ge=1)  # pictures of the calibration set made when none is given; more: surer, longer
    timesteps: int = Field(8, ge=1)  # and calls of each, spread over the run
    batch_size: int = Field(8, ge=1)  # pictures of one call of that set; smaller: more updates in the time, noisier


class ScoredConfig(MethodConfig):
    """Of methods that choose by scores."""

    score: Score = "out_mse"  # what it costs to miss a unit
    by: Literal["parameters", "latency"] = "parameters"  # what the ratio is a share of
    units: Literal["auto", "layer", "depth"] = "auto"  # of U-Nets: layers, or transformer blocks of deep attentions
    groups: str | None = None  # "N:M": of M blocks in a row at least N stay

    @field_validator("groups")
    @classmethod
    def _check_groups(cls, value: str | None) -> str | None:
        if value is not None:
            parse_groups(value)
        return value


class MaskConfig(MethodConfig):
    """Of methods that learn what goes."""

    group: int = Field(4, ge=2, le=8)  # units in a row that are one choice; larger: more patterns, slower to learn
    mask_updates: int = Field(300, ge=1)  # of masks and low-rank updates; more: a surer choice, longer
    mask_learning_rate: float = Field(2e-3, gt=0)  # of the masks; larger: they decide earlier
    mask_rank: int = Field(8, ge=1)  # of the low-rank updates, which are thrown away afterwards


def parse_groups(text: str) -> tuple[int, int]:
    """N and M of "N:M".

    Raises:
        ValueError: another form, or not 0 <= N < M.
    """
    keep, _, of = text.partition(":")
    if not (keep.isdecimal() and of.isdecimal() and int(keep) < int(of)):
        raise ValueError("write N:M with N below M, for example 3:4")
    return int(keep), int(of)
