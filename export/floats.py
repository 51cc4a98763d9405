"""A component as plain floats: integers dequantized, one tensor in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..core.errors import UnsupportedError
from ..core.reporter import Reporter
from ..core.safe_read import weight_stem
from ..core.tensor_file import LazyTensor, Writable, write_weights
from .contents import Contents

LARGEST_FLOAT8 = 448.0  # of E4M3
FLOATS = ("F64", "F32", "F16", "BF16")
SHORT_FLOATS = {"bfloat16": "BF16", "float16": "F16"}  # torch -> safetensors, where a format has a choice


def write_floats(contents: Contents, folder: Path, dtype_of: Callable[[str], str], reporter: Reporter) -> None:
    """Write weights and config as diffusers' `from_pretrained` reads them.

    Args:
        dtype_of: name of a tensor -> safetensors dtype that it is written in; what is no float stays as it is.
    """
    tensors: dict[str, Writable] = {}
    for name, tensor in contents.floats.items():
        tensors[name] = tensor  # no float, or already of its type
        if tensor.dtype in FLOATS and tensor.dtype != dtype_of(name):
            tensors[name] = _lazy(contents, name, tensor.shape, dtype_of(name))
    for layer, stored in contents.layers.items():
        name = f"{layer}.weight"
        tensors[name] = _lazy(contents, name, stored.shape, dtype_of(name))
    reporter.say(f"export {contents.name}: {len(tensors)} tensors")
    write_weights(folder, weight_stem(contents.folder), tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(contents.config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _lazy(contents: Contents, name: str, shape: tuple[int, ...], dtype: str) -> LazyTensor:
    def make() -> Tensor:
        tensor = contents.load(name)
        if dtype == "F8_E4M3" and not bool((tensor.abs() <= LARGEST_FLOAT8).all()):
            raise UnsupportedError(
                f"{name} of {contents.name} has values up to {float(tensor.abs().max()):.4g}.",
                f"8-bit floats without scales end at {LARGEST_FLOAT8:g}.",
                "Choose another --format.",
            )
        return tensor

    return LazyTensor(tuple(shape), dtype, make)
