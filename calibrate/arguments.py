"""The arguments of a denoiser call, taken apart for storage and put together again exactly as they were.

Plain values stand for themselves in JSON; everything else is a table with one key that says what it is:

    {"tensor": name}   {"list": [...]}   {"tuple": [...]}   {"dict": [[key, value], ...]}

A tensor's name is the hash of its content, so equal ones (prompt embeddings come with every call) are stored once. One
that was cast for storage says its own type too: {"tensor": name, "dtype": "float32"}.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.errors import BundleError, CalibrationError, UnsupportedError
from ..core.tensor_file import TORCH_NAMES, content_hash

PLAIN = (type(None), bool, int, float, str)
LARGE = 3  # dimensions; smaller tensors are timesteps, positions and vectors, which a cast could make wrong


class Packer:
    """Packs argument trees and keeps their tensors.

    Args:
        store_dtype: "bfloat16" or "float16" for large float tensors, or "as-is".
    """

    def __init__(self, store_dtype: str = "as-is") -> None:
        self.tensors: dict[str, Tensor] = {}
        self._dtype = None if store_dtype == "as-is" else getattr(torch, store_dtype)

    def pack(self, value: Any, where: str) -> Any:
        """What stands for `value` in JSON.

        Args:
            where: names the value in messages.

        Raises:
            UnsupportedError: a kind of value that cannot be stored without pickling.
            CalibrationError: it is or holds NaN or infinity.
        """
        if isinstance(value, Tensor):
            return self._pack_tensor(value, where)
        if type(value) in PLAIN:
            if isinstance(value, float) and not math.isfinite(value):
                raise _not_finite(where)
            return value
        if type(value) in (list, tuple):
            parts = [self.pack(part, f"{where}[{index}]") for index, part in enumerate(value)]
            return {type(value).__name__: parts}
        if type(value) is dict and all(type(key) is str for key in value):
            return {"dict": [[key, self.pack(part, f"{where}[{key!r}]")] for key, part in value.items()]}
        raise UnsupportedError(
            f"{where} is a {type(value).__name__}, which a calibration set cannot hold.",
            "It holds tensors, numbers, texts, None, and lists, tuples and tables of them; nothing is pickled.",
            "Report the pipeline's class, or choose another with --component.",
        )

    def _pack_tensor(self, value: Tensor, where: str) -> dict[str, str]:
        if value.layout != torch.strided or _name_of(value.dtype) not in TORCH_NAMES:
            raise UnsupportedError(
                f"{where} is a tensor of {value.dtype} and {value.layout}, which a calibration set cannot hold.",
                mend="Choose another --dtype or --component.",
            )
        kept, note = value.detach().cpu(), {}
        if not is_finite(kept):
            raise _not_finite(where)
        if self._dtype and kept.is_floating_point() and kept.ndim >= LARGE and kept.itemsize > self._dtype.itemsize:
            kept, note = kept.to(self._dtype), {"dtype": _name_of(value.dtype)}
            if not is_finite(kept):
                raise CalibrationError(
                    f"{where} exceeds the range of {_name_of(self._dtype)}.", mend="Use --store-dtype bfloat16."
                )
        name = content_hash({"": kept})
        if name not in self.tensors:
            self.tensors[name] = kept.clone(memory_format=torch.contiguous_format)
        return {"tensor": name, **note}


def unpack(packed: Any, load: Callable[[str, torch.dtype | None], Tensor]) -> Any:
    """The value that `Packer.pack` was given.

    Args:
        load: gives a tensor by its name and the type that it had, None for that in which it is stored.

    Raises:
        BundleError: nothing that `Packer` writes.
    """
    if type(packed) in PLAIN:
        return packed
    match packed:
        case {"tensor": str(name), "dtype": str(dtype)} if dtype in TORCH_NAMES:
            return load(name, getattr(torch, dtype))
        case {"tensor": str(name), **rest} if not rest:
            return load(name, None)
        case {"list": list(parts), **rest} if not rest:
            return [unpack(part, load) for part in parts]
        case {"tuple": list(parts), **rest} if not rest:
            return tuple(unpack(part, load) for part in parts)
        case {"dict": list(pairs), **rest} if not rest:
            return {key: unpack(part, load) for key, part in pairs}
    raise BundleError(f"a stored argument is written as {str(packed)[:80]!r}.", mend="Make the set anew.")


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity."""
    return not (tensor.is_floating_point() or tensor.is_complex()) or bool(torch.isfinite(tensor).all())


def _not_finite(where: str) -> CalibrationError:
    return CalibrationError(
        f"{where} holds NaN or infinity.",
        "Statistics of it would be worthless.",
        "Try --dtype float32, other --steps or another --guidance-scale; does dacc generate make good pictures?",
    )


def _name_of(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
