"""NF4 of bitsandbytes (QLoRA, Dettmers et al., 2023, arXiv 2305.14314): blocks of 64 values, each the nearest of 16
quantiles of the normal distribution times the largest magnitude of its block.

diffusers loads it on accelerators only, transformers everywhere. No grid of a bundle has these levels: linears are
rounded anew, all else is bfloat16. Letters: N values of a weight, B blocks of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ...core.config import Config
from ...core.reporter import Reporter
from ...core.safe_read import weight_stem
from ...core.tensor_file import LazyTensor, write_weights
from ..contents import Contents
from ..floats import SHORT_FLOATS
from ..rows import choose_linears, float_tensors, skips_by_path, write_config

ROUNDS = True
LIBRARIES = ("diffusers", "transformers")  # whose models it takes
KEEPS = ()
BLOCK = 64
# of the paper's appendix E, as bitsandbytes has them in its files
LEVELS = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip

LOAD_LINES = """import torch
from diffusers import DiffusionPipeline

# needs bitsandbytes, and for a denoiser a GPU; text encoders run without one too
pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.DTYPE).to("cuda")"""


class NF4Config(Config):
    """Fields of `--set`."""

    # of the floats; the pipeline has to be loaded in it: the loader of text encoders keeps what the file has
    dtype: Literal["bfloat16", "float16"] = "bfloat16"


CONFIG = NF4Config


def quantize_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes (ceil(N / 2), 1) uint8, the first of two in the high half, and magnitudes (B,) float32; the last
    block may be shorter."""
    flat = weight.float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1)
    share = blocks / torch.where(largest == 0, 1.0, largest).unsqueeze(1)
    codes = torch.bucketize(share, (LEVELS[1:] + LEVELS[:-1]) / 2).flatten()[: len(flat)].to(torch.uint8)
    zero = torch.full((len(flat) % 2,), 7, dtype=torch.uint8)
    pairs = torch.cat([codes, zero]).view(-1, 2)
    return (pairs[:, :1] << 4 | pairs[:, 1:]), largest


def write(contents: Contents, folder: Path, config: NF4Config, reporter: Reporter) -> dict[str, Any]:
    """Write a component as the bitsandbytes loaders of diffusers and transformers want it."""
    choice = choose_linears(contents, skips_by_path, reporter)
    tensors = float_tensors(contents, choice, SHORT_FLOATS[config.dtype])
    for name, shape in choice.rounded.items():
        weight, values = f"{name}.weight", prod(shape)
        halves, blocks = -(-values // 2), -(-values // BLOCK)
        codes = LazyTensor((halves, 1), "U8", lambda weight=weight: quantize_nf4(contents.load(weight))[0])  # type: ignore[misc]
        largest = LazyTensor((blocks,), "F32", lambda weight=weight: quantize_nf4(contents.load(weight))[1])  # type: ignore[misc]
        state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": config.dtype, "shape": list(shape)}
        told = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
        tensors |= {
            weight: codes,
            f"{weight}.absmax": largest,
            f"{weight}.quant_map": LEVELS,
            f"{weight}.quant_state.bitsandbytes__nf4": told,
        }
    write_weights(folder, weight_stem(contents.folder), tensors, {"format": "pt"})
    block = {
        "quant_method": "bitsandbytes",
        "load_in_8bit": False,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": config.dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_skip_modules": choice.left_out,
    }
    write_config(contents, folder, block, config.dtype)
    reporter.say(f"export {contents.name}: {len(choice.rounded)} linears of 4 bits")
    return {"layers": len(choice.rounded), "dtype": config.dtype}


def load_lines(contents: Contents, written: Mapping[str, Any]) -> str:
    """How a reader gets the model back, for the README of the export."""
    return LOAD_LINES.replace("DTYPE", written["dtype"])
