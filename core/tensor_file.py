"""Writing safetensors files as a stream: tensors pass through one at a time, so memory follows the largest tensor.

Layout and header are those of the safetensors library (larger types first, then names), with sorted metadata, so that
equal tensors give equal bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from .errors import BundleError
from .safe_read import DTYPE_BITS, TensorInfo, component_tensors

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_BYTES = 16_000_000
SHARD_BYTES = 5_000_000_000  # a component with more weights is split into several files
TORCH_NAMES = {  # torch -> safetensors
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "float8_e5m2": "F8_E5M2", "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0", "int16": "I16", "uint16": "U16", "float16": "F16", "bfloat16": "BF16",
    "int32": "I32", "uint32": "U32", "float32": "F32", "complex64": "C64", "float64": "F64", "int64": "I64",
    "uint64": "U64",
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in a checked safetensors file and is read when it is needed."""

    file: Path
    info: TensorInfo
    cast: str | None = None  # safetensors dtype to convert to on the way out

    @property
    def dtype(self) -> str:
        """Safetensors name of the type that it will have when written."""
        return self.cast or self.info.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.info.shape

    def to(self, dtype: str) -> StoredTensor:
        """The same tensor, converted to another safetensors dtype (for example "BF16") whenever it is read."""
        return replace(self, cast=None if dtype == self.info.dtype else dtype)

    def load(self) -> Tensor:
        """The tensor in memory."""
        import torch

        with self.file.open("rb") as stream:
            stream.seek(self.info.start)
            raw = bytearray(stream.read(self.info.end - self.info.start))
        if not raw:
            return torch.empty(self.shape, dtype=torch_dtype(self.dtype))
        tensor = torch.frombuffer(raw, dtype=torch_dtype(self.info.dtype)).reshape(self.shape)
        return tensor.to(torch_dtype(self.dtype))

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Its bytes as they will be written."""
        if self.cast is not None:
            yield from _memory_chunks(self.load())
            return
        with self.file.open("rb") as stream:
            stream.seek(self.info.start)
            left = self.info.end - self.info.start
            while left > 0:
                chunk = stream.read(min(CHUNK_BYTES, left))
                if not chunk:
                    raise BundleError(f"{self.file} became shorter while it was read.", mend="Copy it again.")
                left -= len(chunk)
                yield chunk


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is needed."""

    shape: tuple[int, ...]
    dtype: str  # safetensors name of the type that it will have when written
    make: Callable[[], Tensor]  # any dtype

    def load(self) -> Tensor:
        """The tensor in memory."""
        return self.make().to(torch_dtype(self.dtype))

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Its bytes as they will be written."""
        yield from _memory_chunks(self.load())


Writable: TypeAlias = "StoredTensor | LazyTensor | Tensor"


def stored_tensors(component_folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a component's weight files, sorted by name, none of them read yet.

    Raises:
        BundleError: a file is damaged or missing.
    """
    return {name: StoredTensor(path, info) for name, (path, info) in component_tensors(component_folder).items()}


def tensor_bytes(tensor: Writable) -> int:
    """Bytes that the tensor takes in a file."""
    return prod(tensor.shape) * DTYPE_BITS[_dtype_name(tensor)] // 8


def write_tensors(file: Path, tensors: Mapping[str, Writable], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file, atomically within its folder. It is not forced to the disk."""
    rank = {dtype: place for place, dtype in enumerate(DTYPE_BITS)}
    ordered = sorted(tensors, key=lambda name: (-rank[_dtype_name(tensors[name])], name))
    unfinished = file.with_name(f".{file.name}.writing")
    with unfinished.open("wb") as stream:
        stream.write(_header(ordered, tensors, metadata))
        for name in ordered:
            for chunk in _chunks(tensors[name]):
                stream.write(chunk)
    os.replace(unfinished, file)


def content_hash(tensors: Mapping[str, Writable]) -> str:
    """SHA-256 over names, types and bytes, whether the tensors are in memory or in a file."""
    digest = sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {_dtype_name(tensors[name])} {tuple(tensors[name].shape)}\n".encode())
        for chunk in _chunks(tensors[name]):
            digest.update(chunk)
    return digest.hexdigest()


def write_weights(
    folder: Path,
    stem: str,
    tensors: Mapping[str, Writable],
    metadata: Mapping[str, str],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the weights of a component: one file, or shards and their index, named as diffusers names them."""
    shards = _split(tensors, shard_bytes)
    if len(shards) == 1:
        write_tensors(folder / f"{stem}.safetensors", tensors, metadata)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file_name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file_name, {name: tensors[name] for name in names}, metadata)
        weight_map.update(dict.fromkeys(names, file_name))
    index = {"metadata": {"total_size": sum(map(tensor_bytes, tensors.values()))}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def _split(tensors: Mapping[str, Writable], shard_bytes: int) -> list[list[str]]:
    """Names in sorted order, cut wherever the next tensor would make a file longer than `shard_bytes`."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(tensors):
        size = tensor_bytes(tensors[name])
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _header(ordered: list[str], tensors: Mapping[str, Writable], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name in ordered:
        tensor, start = tensors[name], position
        position += tensor_bytes(tensor)
        table[name] = {"dtype": _dtype_name(tensor), "shape": list(tensor.shape), "data_offsets": [start, position]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data begins on a multiple of 8, as mapped 64-bit tensors need
    return len(text).to_bytes(8, "little") + text


def _chunks(tensor: Writable) -> Iterator[bytes | memoryview]:
    return tensor.chunks() if isinstance(tensor, StoredTensor | LazyTensor) else _memory_chunks(tensor)


def _memory_chunks(tensor: Tensor) -> Iterator[memoryview]:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        raw: Any = flat.view(torch.uint8).numpy()
        yield memoryview(raw)


def _dtype_name(tensor: Writable) -> str:
    if isinstance(tensor, StoredTensor | LazyTensor):
        return tensor.dtype
    return TORCH_NAMES[str(tensor.dtype).removeprefix("torch.")]


def torch_dtype(name: str) -> Any:
    """The torch dtype of a safetensors name."""
    import torch

    return getattr(torch, next(torch_name for torch_name, stored in TORCH_NAMES.items() if stored == name))
