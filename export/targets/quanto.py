"""optimum-quanto, which diffusers loads until its version 1.0: linears as int8 rows with one scale each.

Rows of 8-bit codes of a bundle stay as they are, also those of two-level 4-bit weights; other linears are rounded to
nearest. All else is bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...core.config import Config
from ...core.reporter import Reporter
from ...core.safe_read import weight_stem
from ...core.tensor_file import LazyTensor, write_weights
from ..contents import Contents
from ..rows import (
    choose_linears,
    count_kept,
    float_tensors,
    has_rows,
    rows_of,
    skips_by_last_part,
    tell_rounded,
    write_config,
)

ROUNDS = False
KEEPS = ()

LOAD_LINES = """import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)  # needs optimum-quanto"""


class QuantoConfig(Config):
    """No fields."""


CONFIG = QuantoConfig


def write(contents: Contents, folder: Path, config: QuantoConfig, reporter: Reporter) -> dict[str, Any]:
    """Write a component as diffusers' quanto loader wants it."""
    choice = choose_linears(contents, skips_by_last_part, reporter)
    tensors = float_tensors(contents, choice, "BF16")
    for name, (rows, features) in choice.rounded.items():
        codes = LazyTensor((rows, features), "I8", lambda name=name: rows_of(contents, name)[0])  # type: ignore[misc]
        # bfloat16 would spoil the scales, and quanto multiplies in the type that they have
        scale = LazyTensor((rows, 1), "F32", lambda name=name: rows_of(contents, name)[1])  # type: ignore[misc]
        tensors |= {f"{name}.weight._data": codes, f"{name}.weight._scale": scale}
        tensors |= {f"{name}.{side}_scale": torch.ones((), dtype=torch.bfloat16) for side in ("input", "output")}
    write_weights(folder, weight_stem(contents.folder), tensors, {"format": "pt"})
    block = {
        "quant_method": "quanto",
        "weights_dtype": "int8",
        "modules_to_not_convert": sorted({name.rpartition(".")[2] for name in choice.left_out}),
    }
    write_config(contents, folder, block, "bfloat16")
    kept = count_kept(contents, choice.rounded, has_rows)
    tell_rounded(contents, choice.rounded, kept, reporter)
    return {"layers": len(choice.rounded), "same_codes": kept}


def load_lines(contents: Contents, written: Mapping[str, Any]) -> str:
    """How a reader gets the model back, for the README of the export."""
    return LOAD_LINES
