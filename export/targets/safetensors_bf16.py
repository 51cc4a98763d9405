"""Plain bfloat16 for any loader. The integers of a bundle are dequantized: what rounding did to the weights stays in
them, what it saved is gone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...core.config import Config
from ...core.reporter import Reporter
from ..contents import Contents
from ..floats import write_floats

ROUNDS = False  # the weights of the source are the ones that are exported
LIBRARIES = ("diffusers", "transformers")  # whose models it takes; text encoders are of transformers
KEEPS = ()  # what of a bundle beside weights it holds, see ../losses.py

LOAD_LINES = """import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)"""


class BFloat16Config(Config):
    """No fields."""


CONFIG = BFloat16Config


def write(contents: Contents, folder: Path, config: BFloat16Config, reporter: Reporter) -> dict[str, Any]:
    """Write a component as plain diffusers loads it."""
    write_floats(contents, folder, lambda _: "BF16", reporter)
    return {"dequantized": len(contents.layers)}


def load_lines(contents: Contents, written: Mapping[str, Any]) -> str:
    """How a reader gets the model back, for the README of the export."""
    return LOAD_LINES
