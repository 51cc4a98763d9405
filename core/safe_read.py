"""Reading weight files without trusting them: names, links and headers are checked before anything is mapped.

Needs neither torch nor safetensors, so that a damaged or hostile folder is refused before heavy libraries see it. Every
violation is a BundleError that names the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from .errors import BundleError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_JSON_BYTES = 64_000_000  # shard indices of the largest models have a few MB
HASH_CHUNK_BYTES = 4_000_000
HASH_THREADS = 4
DTYPE_BITS = {  # safetensors names, in the order in which the safetensors library lays them out (last first)
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
WEIGHT_STEMS = ("diffusion_pytorch_model", "model")  # diffusers, transformers
VARIANTS = ("fp16", "bf16")  # read only when the plain files are absent
SHARED_STORE_MARK = ".huggingface-shared-blobs"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file."""

    dtype: str  # safetensors name, a key of DTYPE_BITS
    shape: tuple[int, ...]
    start: int  # first byte, counted from the beginning of the file
    end: int  # first byte after it


# JSON


def read_json(file: Path, *, limit: int = MAX_JSON_BYTES) -> Any:
    """The content of a JSON file of bounded size, without duplicate keys.

    Raises:
        BundleError: the file is missing, too long, not UTF-8, not JSON, nested too deep, or repeats a key.
    """
    try:
        if file.stat().st_size > limit:
            _refuse(file, f"is longer than {limit} bytes, the limit for JSON")
        text = file.read_bytes()
    except OSError as error:
        _refuse(file, f"cannot be read ({error.strerror})")
    return _parse_json(file, text)


def _parse_json(file: Path, text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
    except RecursionError:
        _refuse(file, "holds JSON that is nested too deep")
    except ValueError as error:
        _refuse(file, f"holds no valid JSON ({error})")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {repeated!r} appears twice")
    return result


# safetensors headers


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, in the order of their bytes, after all checks that need only the header.

    Raises:
        BundleError: the header or any entry in it does not agree with itself or with the length of the file.
    """
    return read_header_and_metadata(file)[0]


def read_header_and_metadata(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Like `read_header`, together with the text pairs that the writer attached."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                _refuse(file, f"is truncated: {size} bytes cannot hold its own header")
            if length > MAX_HEADER_BYTES:
                _refuse(file, f"has a header of {length} bytes; the limit is {MAX_HEADER_BYTES}")
            header = _parse_json(file, stream.read(length))
    except OSError as error:
        _refuse(file, f"cannot be read ({error.strerror})")
    if not isinstance(header, dict):
        _refuse(file, "has a header that is not a table of tensors")
    metadata = _checked_metadata(file, header.pop("__metadata__", {}))
    tensors = {name: _checked_tensor(file, name, entry, 8 + length) for name, entry in header.items()}
    return _checked_layout(file, tensors, 8 + length, size), metadata


def _checked_metadata(file: Path, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(file, "has __metadata__ that is not text to text")
    return metadata


def _checked_tensor(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse(file, f"describes tensor {name!r} by other fields than dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _refuse(file, f"gives tensor {name!r} the unknown dtype {dtype!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(file, f"gives tensor {name!r} an impossible shape or offsets ({shape!r}, {offsets!r})")
    bits = prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        _refuse(file, f"gives tensor {name!r} {offsets[1] - offsets[0]} bytes; {dtype} {shape} needs {bits / 8:g}")
    return TensorInfo(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _checked_layout(file: Path, tensors: dict[str, TensorInfo], start: int, size: int) -> dict[str, TensorInfo]:
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    position = start
    for name, info in ordered.items():
        if info.start != position:
            _refuse(file, f"has {'overlapping bytes' if info.start < position else 'a hole'} before tensor {name!r}")
        position = info.end
    if position > size:
        _refuse(file, f"is truncated: its tensors need {position} bytes, it has {size}")
    if position < size:
        _refuse(file, f"has {size - position} bytes that belong to no tensor")
    return ordered


# the weight files of a component


def resolve_shards(component_folder: Path) -> dict[str, Path]:
    """File name -> path of the weight files of one component, from its index or its single file.

    Raises:
        BundleError: no weights, a shard is missing, a name is not plain, or a link leaves the folder.
    """
    entry, root = _weight_entry(component_folder), pipeline_root(component_folder)
    names = sorted(set(_weight_map(entry).values())) if entry.suffix == ".json" else [entry.name]
    return {name: _checked_shard(component_folder / name, root) for name in names}


def weight_stem(component_folder: Path) -> str:
    """What the weight files of a component are called: `diffusion_pytorch_model` or `model`."""
    return _weight_entry(component_folder).name.partition(".")[0]


def component_tensors(component_folder: Path) -> dict[str, tuple[Path, TensorInfo]]:
    """Tensor name -> (file, header entry) of a component, sorted by name.

    Raises:
        BundleError: like `resolve_shards` and `read_header`; also when a tensor is in two shards, or the index and the
            shards name different tensors.
    """
    found: dict[str, tuple[Path, TensorInfo]] = {}
    for path in resolve_shards(component_folder).values():
        for name, info in read_header(path).items():
            if name in found:
                _refuse(path, f"holds tensor {name!r}, which {found[name][0].name} holds too")
            found[name] = (path, info)
    entry = _weight_entry(component_folder)
    if entry.suffix == ".json":
        listed = _weight_map(entry)
        if wrong := sorted(listed.items() ^ {(name, path.name) for name, (path, _) in found.items()}):
            _refuse(entry, f"does not agree with the shards about tensor {wrong[0][0]!r}")
    return dict(sorted(found.items()))


def _weight_entry(component_folder: Path) -> Path:
    """The file through which a component's weights are found: its index or its single file."""
    for candidate in _weight_candidates():
        file = component_folder / candidate
        if file.is_file() or file.is_symlink():
            return checked_link(file, pipeline_root(component_folder))
    raise BundleError(
        f"{component_folder} holds no safetensors weights.", mend="Copy the folder again, or convert its weights."
    )


def _weight_candidates() -> Iterable[str]:
    """Possible weight files, preferred first: diffusers reads the index before the single file, transformers after."""
    diffusers, transformers = WEIGHT_STEMS
    for variant in ("", *VARIANTS):
        dotted = f".{variant}" if variant else ""
        yield f"{diffusers}.safetensors.index{dotted}.json"
        yield f"{diffusers}{dotted}.safetensors"
        yield f"{transformers}{dotted}.safetensors"
        yield f"{transformers}.safetensors.index{dotted}.json"


def _weight_map(index: Path) -> dict[str, str]:
    raw = read_json(index)
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        _refuse(index, "has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or not is_plain_name(name) or not name.endswith(".safetensors"):
            _refuse(index, f"names {name!r}, which is not a plain safetensors file name")
    return weight_map


def _checked_shard(file: Path, root: Path) -> Path:
    if not checked_link(file, root).is_file():
        _refuse(file, "is missing")
    return file


# names and links


def is_plain_name(name: str) -> bool:
    """Whether a name taken from a file names something directly inside a folder."""
    return bool(name) and name not in (".", "..") and not set(name) & set("/\\\0:")


def pipeline_root(component_folder: Path) -> Path:
    """The pipeline folder around a component, or the component itself when it stands alone."""
    parent = component_folder.parent
    return parent if (parent / "model_index.json").is_file() else component_folder


def checked_link(file: Path, root: Path) -> Path:
    """`file` itself when it is inside `root`, also after following links, or in the Hub cache that `root` belongs to.

    Raises:
        BundleError: the link ends elsewhere, nowhere, or in a circle.
    """
    try:
        real = file.resolve(strict=True)
        if any(real.is_relative_to(folder) for folder in _allowed_folders(root)):
            return file
    except (OSError, RuntimeError):
        _refuse(file, "is a link to nothing" if file.is_symlink() else "is missing")
    _refuse(file, f"leads out of its folder, to {real}")


def _allowed_folders(root: Path) -> list[Path]:
    """The folder, and for a Hub snapshot the blobs of its repository and the marked store shared by the whole cache."""
    root = root.resolve()
    allowed = [root]
    if root.parent.name == "snapshots" and root.parents[1].name.startswith("models--"):
        allowed.append(root.parents[1] / "blobs")
        shared = root.parents[2] / "blobs"
        if (shared / SHARED_STORE_MARK).is_file():
            allowed.append(shared)
    return allowed


# hashes


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, read in chunks."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def file_hashes(files: Mapping[str, Path]) -> dict[str, str]:
    """Name -> SHA-256 of several files, a few at a time."""
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return dict(zip(files, pool.map(file_sha256, files.values()), strict=True))


def weight_hash(component_folder: Path) -> str:
    """Identity of a component's weights: one hash over the names and hashes of its weight files."""
    return combined_hash(file_hashes(resolve_shards(component_folder)))


def combined_hash(hashes: Mapping[str, str]) -> str:
    """One hash over (name, hash) pairs, independent of their order."""
    return hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()


def _refuse(file: Path, problem: str) -> NoReturn:
    raise BundleError(f"{file} {problem}.", mend="Copy or download it again; dacc verify checks a whole bundle.")
