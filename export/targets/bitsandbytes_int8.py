"""LLM.int8() of bitsandbytes (Dettmers et al., 2022, arXiv 2208.07339): linears as int8 rows, w = SCB / 127 * q.

diffusers loads them on accelerators only, transformers everywhere. bitsandbytes rounds the inputs too, but for features
with values above 6, which it multiplies in 16 bits. Rows of 8-bit codes of a bundle stay as they are; other linears are
rounded to nearest. All else is float16, the type that its products compute in, but for the layers of text encoders that
have to stay float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from ...core.config import Config
from ...core.reporter import Reporter
from ...core.safe_read import weight_stem
from ...core.tensor_file import LazyTensor, write_weights
from ..contents import Contents
from ..floats import SHORT_FLOATS
from ..rows import (
    LARGEST,
    choose_linears,
    count_kept,
    float_tensors,
    has_rows,
    rows_of,
    skips_by_path,
    tell_rounded,
    write_config,
)

ROUNDS = False
LIBRARIES = ("diffusers", "transformers")  # whose models it takes
KEEPS = ()
ROWS_IN_ORDER = 0  # the only layout that bitsandbytes still writes

LOAD_LINES = """import torch
from diffusers import DiffusionPipeline

# needs bitsandbytes, and for a denoiser a GPU; text encoders run without one too
pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.DTYPE).to("cuda")"""


class Int8Config(Config):
    """Fields of `--set`."""

    # of the floats; the pipeline has to be loaded in it: the loader of text encoders keeps what the file has
    dtype: Literal["bfloat16", "float16"] = "float16"


CONFIG = Int8Config


def write(contents: Contents, folder: Path, config: Int8Config, reporter: Reporter) -> dict[str, Any]:
    """Write a component as the bitsandbytes loaders of diffusers and transformers want it."""
    choice = choose_linears(contents, skips_by_path, reporter)
    tensors = float_tensors(contents, choice, SHORT_FLOATS[config.dtype])
    for name, (rows, features) in choice.rounded.items():
        codes = LazyTensor((rows, features), "I8", lambda name=name: rows_of(contents, name)[0])  # type: ignore[misc]
        largest = LazyTensor((rows,), "F32", lambda name=name: rows_of(contents, name)[1].flatten() * LARGEST)  # type: ignore[misc]
        layout = torch.tensor(ROWS_IN_ORDER, dtype=torch.uint8)
        tensors |= {f"{name}.weight": codes, f"{name}.SCB": largest, f"{name}.weight_format": layout}
    write_weights(folder, weight_stem(contents.folder), tensors, {"format": "pt"})
    block = {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": choice.left_out,
    }
    write_config(contents, folder, block, config.dtype)
    kept = count_kept(contents, choice.rounded, has_rows)
    tell_rounded(contents, choice.rounded, kept, reporter)
    reporter.notice(f"bitsandbytes rounds what enters the linears of {contents.name} too, token by token.")
    return {"layers": len(choice.rounded), "same_codes": kept, "dtype": config.dtype}


def load_lines(contents: Contents, written: Mapping[str, Any]) -> str:
    """How a reader gets the model back, for the README of the export."""
    return LOAD_LINES.replace("DTYPE", written["dtype"])
