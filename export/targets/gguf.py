"""GGUF: what `Model.from_single_file(FILE, config=OUTPUT)` of diffusers reads, with the tensor names of diffusers, or
with those of the published checkpoint, which ComfyUI and stable-diffusion.cpp look for.

Weights of linears are cut into blocks of 32 input features, each with a scale (and a least value) of its own, as the
gguf package rounds them to nearest; or into super-blocks of 256, see `export/k_quants.py`. Convolutions, and linears
whose width no block divides, are float16; vectors are float32.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from torch import Tensor, nn

from ...core.config import Config
from ...core.errors import UnsupportedError
from ...core.pipeline import walk_layers
from ...core.reporter import Reporter
from ...runtime.skeleton import build_skeleton
from ..contents import Contents, layers_to_round
from ..k_quants import quantize_k
from ..original_names import FAMILIES, Source, original_sources

ROUNDS = True
KEEPS = ()
LONGEST_NAME = 127  # bytes; readers refuse longer ones
BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
SUPER_BLOCKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # and what stands in where they do not divide a width
FILE_TYPES = {  # the type of most tensors, under the names of the gguf package
    "F16": "MOSTLY_F16", "Q4_0": "MOSTLY_Q4_0", "Q4_1": "MOSTLY_Q4_1", "Q5_0": "MOSTLY_Q5_0", "Q5_1": "MOSTLY_Q5_1",
    "Q8_0": "MOSTLY_Q8_0", "Q4_K": "MOSTLY_Q4_K_S", "Q5_K": "MOSTLY_Q5_K_S", "Q6_K": "MOSTLY_Q6_K",
}  # fmt: skip
BY_BITS = ((4, "Q4_1"), (5, "Q5_1"))  # at most so many bits -> the type that `auto` takes, else Q8_0


class GGUFConfig(Config):
    """Fields of `--set`."""

    # auto: of each layer by its bits in the bundle
    type: Literal["auto", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k"] = "auto"
    # original: of the published checkpoint, where several layers of diffusers are one; Flux and Stable Diffusion 3
    names: Literal["diffusers", "original"] = "diffusers"


CONFIG = GGUFConfig


def write(contents: Contents, folder: Path, config: GGUFConfig, reporter: Reporter) -> dict[str, Any]:
    """Write one file, and the config that tells a reader what the tensors belong to.

    Raises:
        UnsupportedError: the gguf package is missing, a name is too long for the format, or the published names are
            not known.
    """
    gguf = _library()
    sources = _sources(contents, config)
    types = _joined_types(_types(contents, config, gguf), sources, gguf)
    usual = Counter(kind.name for kind in types.values() if kind.name in BLOCKS).most_common(1)
    file = folder / f"{contents.name}-{usual[0][0] if usual else 'F16'}.gguf"
    original = config.names == "original"
    writer = gguf.GGUFWriter(file, arch=FAMILIES[contents.class_name].architecture if original else contents.class_name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[usual[0][0] if usual else "F16"]])
    for name, source in sources.items():
        _add(writer, name, _joined_shape(contents, source), types[name], gguf)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, kind in reporter.progress(types.items(), f"export {contents.name}", len(types)):
        values = _joined(contents, sources[name])
        if kind.name in SUPER_BLOCKS:
            writer.write_tensor_data(quantize_k(values, kind.name).numpy())
        else:
            writer.write_tensor_data(gguf.quants.quantize(numpy.ascontiguousarray(values.numpy()), kind))
    writer.close()
    (folder / "config.json").write_text(json.dumps(contents.config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _tell_of_readers(contents, file, reporter)
    return {"file": f"{contents.name}/{file.name}", "types": dict(Counter(kind.name for kind in types.values()))}


def load_lines(contents: Contents, written: Mapping[str, Any]) -> str:
    """How a reader gets the model back, for the README of the export."""
    file = written["file"]
    return f"""import torch
from diffusers import DiffusionPipeline, {contents.class_name}, GGUFQuantizationConfig

model = {contents.class_name}.from_single_file(
    f"{{folder}}/{file}",
    config=folder,
    subfolder="{contents.name}",
    quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16),
    dtype=torch.bfloat16,
)
pipe = DiffusionPipeline.from_pretrained(folder, {contents.name}=model, dtype=torch.bfloat16)"""


def type_of(bits: int, config: GGUFConfig) -> str:
    """The type of a linear: the one that is asked for, else the least that has its bits."""
    if config.type != "auto":
        return config.type.upper()
    return next((name for most, name in BY_BITS if bits <= most), "Q8_0")


def _sources(contents: Contents, config: GGUFConfig) -> dict[str, Source]:
    """Name of every tensor of the file -> what it is made of."""
    names = contents.shapes()
    if config.names == "original":
        return dict(sorted(original_sources(contents.class_name, names.keys()).items()))
    return {name: Source((name,)) for name in names}


def _joined(contents: Contents, source: Source) -> Tensor:
    parts = [contents.load(part).float() for part in source.parts]
    values = torch.cat(parts) if len(parts) > 1 else parts[0]
    return torch.cat(values.chunk(2)[::-1]) if source.swapped else values


def _joined_shape(contents: Contents, source: Source) -> tuple[int, ...]:
    shapes = [contents.shapes()[part] for part in source.parts]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _joined_types(types: Mapping[str, Any], sources: Mapping[str, Source], gguf: Any) -> dict[str, Any]:
    """Name of every tensor of the file -> the widest type of its parts."""

    def bits(kind: Any) -> float:
        values, width = gguf.GGML_QUANT_SIZES[kind]
        return float(width / values)

    return {name: max((types[part] for part in source.parts), key=bits) for name, source in sources.items()}


def _types(contents: Contents, config: GGUFConfig, gguf: Any) -> dict[str, Any]:
    """Name of every tensor -> its type."""
    kinds = gguf.GGMLQuantizationType
    layers = walk_layers(build_skeleton(contents.folder))
    linears = {name for name, layer in layers if isinstance(layer, nn.Linear)} & layers_to_round(contents)
    found = {}
    for name, shape in contents.shapes().items():
        found[name] = kinds.F16 if len(shape) > 1 else kinds.F32
        layer, _, parameter = name.rpartition(".")
        if layer in linears and parameter == "weight":
            blocks = kinds[type_of(contents.bits.get(layer, 8), config)]
            if shape[-1] % gguf.GGML_QUANT_SIZES[blocks][0] and blocks.name in SUPER_BLOCKS:
                blocks = kinds[SUPER_BLOCKS[blocks.name]]
            size, _ = gguf.GGML_QUANT_SIZES[blocks]
            found[name] = blocks if shape[-1] % size == 0 else kinds.F16
    return found


def _add(writer: Any, name: str, shape: tuple[int, ...], kind: Any, gguf: Any) -> None:
    if len(name.encode()) > LONGEST_NAME:
        raise UnsupportedError(f"the name {name} is longer than GGUF allows.", mend="Choose another --format.")
    size, width = gguf.GGML_QUANT_SIZES[kind]
    count = int(numpy.prod(shape))
    plain = {"F16": numpy.float16, "F32": numpy.float32}.get(kind.name)
    dtype = numpy.dtype(plain or numpy.uint8)
    stored = shape if plain else gguf.quant_shape_to_byte_shape(shape, kind)
    writer.add_tensor_info(name, stored, dtype, count // size * width, raw_dtype=None if plain else kind)


def _tell_of_readers(contents: Contents, file: Path, reporter: Reporter) -> None:
    """Whether diffusers has a class that reads such a file."""
    import diffusers
    from diffusers.loaders import FromOriginalModelMixin

    model_class = getattr(diffusers, contents.class_name)
    if not issubclass(model_class, FromOriginalModelMixin):
        reporter.notice(
            f"diffusers reads no {contents.class_name} from a single file: {file.name} is for programs that use gguf "
            "themselves."
        )


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise UnsupportedError(
            "the gguf package is not installed.", mend="Run pip install 'dacc-diffusion[gguf]'."
        ) from None
    return gguf
