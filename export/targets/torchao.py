"""torchao, which diffusers and transformers load from safetensors files whose metadata describe each tensor.

Linears with one scale per row are `Int8Tensor`. Codes of 8 and fewer bits in groups are `IntxUnpackedToInt8Tensor`,
which holds each in a byte, exactly, zero points included. Other linears are rounded to int8 rows, all else is bfloat16.
Letters: O output and K input features, G groups of a row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.config import Config
from ...core.reporter import Reporter
from ...core.safe_read import weight_stem
from ...core.tensor_file import LazyTensor, write_weights
from ...runtime.packing import unpack_codes
from ..contents import Contents, StoredLayer
from ..rows import (
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

LOAD_LINES = """import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)  # needs torchao"""
# what the loader takes the config from; what is done to each tensor stands in the files
INT8_ROWS = {
    "_type": "Int8WeightOnlyConfig",
    "_version": 2,
    "_data": {"group_size": None, "granularity": {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}},
              "set_inductor_config": True},
}  # fmt: skip


class TorchaoConfig(Config):
    """No fields."""


CONFIG = TorchaoConfig


def has_groups(layer: StoredLayer) -> bool:
    """Whether the codes of a linear are groups that a tensor of torchao holds as they are."""
    scheme = layer.scheme
    plain = scheme.format == "integer" and not scheme.two_level and not scheme.split and not scheme.absorbs_outliers
    return plain and len(layer.shape) == 2 and not has_rows(layer)


def groups_of(layer: StoredLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (O, K) int8, scales (O, G) bfloat16 or float32, and zero points (O, G) int8."""
    scheme, weight = layer.scheme, layer.load()
    codes = unpack_codes(weight.qweight, scheme.bits, layer.shape[1], signed=scheme.symmetric)
    scale = weight.scale.float()
    if weight.zero_point is None:
        return codes, scale, torch.zeros_like(scale, dtype=torch.int8)
    half = 2 ** (scheme.bits - 1)  # codes without a sign and their zero points move down together
    return (codes.short() - half).to(torch.int8), scale, (weight.zero_point.short() - half).to(torch.int8)


def write(contents: Contents, folder: Path, config: TorchaoConfig, reporter: Reporter) -> dict[str, Any]:
    """Write a component as the torchao loaders of diffusers and transformers want it."""
    choice = choose_linears(contents, skips_by_path, reporter)
    tensors = float_tensors(contents, choice, "BF16")
    told: dict[str, Any] = {name: {"_type": "Tensor"} for name in tensors}
    for name, shape in choice.rounded.items():
        layer = contents.layers.get(name)
        made, told[f"{name}.weight"] = (
            _groups(layer) if layer is not None and has_groups(layer) else _rows(contents, name, shape)
        )
        told[f"{choice.modules.get(name, name)}.weight"] = told[f"{name}.weight"]  # transformers looks there
        tensors |= {f"{name}._weight_{part}": tensor for part, tensor in made.items()}
    metadata = {name: json.dumps(value) for name, value in told.items()}
    metadata |= {"format": "pt", "tensor_names": json.dumps(sorted(told))}
    write_weights(folder, weight_stem(contents.folder), tensors, metadata)
    block = {
        "quant_method": "torchao",
        "quant_type": {"default": INT8_ROWS},
        "modules_to_not_convert": choice.left_out or None,
    }
    write_config(contents, folder, block, "bfloat16")
    kept = count_kept(contents, choice.rounded, lambda layer: has_rows(layer) or has_groups(layer))
    tell_rounded(contents, choice.rounded, kept, reporter)
    return {"layers": len(choice.rounded), "same_codes": kept}


def load_lines(contents: Contents, written: Mapping[str, Any]) -> str:
    """How a reader gets the model back, for the README of the export."""
    return LOAD_LINES


Made = tuple[dict[str, LazyTensor], dict[str, Any]]


def _rows(contents: Contents, name: str, shape: tuple[int, ...]) -> Made:
    rows, features = shape
    made = {
        "qdata": LazyTensor((rows, features), "I8", lambda: rows_of(contents, name)[0]),
        "scale": LazyTensor((rows, 1), "F32", lambda: rows_of(contents, name)[1]),
        "zero_point": LazyTensor((rows, 1), "I8", lambda: torch.zeros(rows, 1, dtype=torch.int8)),
    }
    fields = {"act_quant_kwargs": None, "reduce_range": False, "block_size": [1, features], "dtype": _dtype("bfloat16")}
    return made, {"_type": "Int8Tensor", "_data": fields, "_tensor_data_names": sorted(made)}


def _groups(layer: StoredLayer) -> Made:
    rows, features = layer.shape
    size = layer.scheme.group_size or features
    places = (rows, features // size)
    made = {
        "qdata": LazyTensor((rows, features), "I8", lambda: groups_of(layer)[0]),
        "scale": LazyTensor(places, "F32", lambda: groups_of(layer)[1]),
        "zero_point": LazyTensor(places, "I8", lambda: groups_of(layer)[2]),
    }
    fields = {
        "target_dtype": _dtype(f"int{layer.scheme.bits}"),
        "block_size": [1, size],
        "dtype": _dtype("bfloat16"),
        "activation_quantization": None,
    }
    return made, {"_type": "IntxUnpackedToInt8Tensor", "_data": fields, "_tensor_data_names": sorted(made)}


def _dtype(name: str) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": name}
