"""8-bit floats (E4M3) without scales, for loaders that keep weights so in memory and compute in 16 bits: diffusers'
layerwise casting, ComfyUI.

Weights of the layers that a bundle has as integers have 3 bits of mantissa, of a float pipeline those of all linears
and convolutions but the first, the last and those that embed time and class; all else stays bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...core.config import Config
from ...core.reporter import Reporter
from ..contents import Contents, layers_to_round
from ..floats import write_floats

ROUNDS = True  # rounding rounded weights once more would add their errors
KEEPS = ()

LOAD_LINES = """import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
pipe.COMPONENT.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)"""


class Float8Config(Config):
    """No fields."""


CONFIG = Float8Config


def write(contents: Contents, folder: Path, config: Float8Config, reporter: Reporter) -> dict[str, Any]:
    """Write a component as plain diffusers loads it."""
    eight = {f"{layer}.weight" for layer in layers_to_round(contents)}
    write_floats(contents, folder, lambda name: "F8_E4M3" if name in eight else "BF16", reporter)
    return {"in_8_bits": len(eight)}


def load_lines(contents: Contents, written: Mapping[str, Any]) -> str:
    """How a reader gets the model back, for the README of the export."""
    return LOAD_LINES.replace("COMPONENT", contents.name)
