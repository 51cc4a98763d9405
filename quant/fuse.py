"""Add adapters (LoRA: Hu et al., 2021, arXiv 2106.09685) to the weights of a pipeline before these are quantized:

    W' = W + scale * (alpha / r) * B A        A (r, K), B (O, r) from the file, by diffusers' own loaders

Integers cannot take an adapter afterwards without losing it to their rounding.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, DaccError, ModelError, UnsupportedError
from ..core.folder import carried_files, place_file
from ..core.manifest import PassRecord, read_manifest
from ..core.pipeline import pipeline_class
from ..core.reporter import Reporter
from ..core.safe_read import file_sha256, read_header
from ..core.source import Source
from ..core.tensor_file import stored_tensors, torch_dtype

COMMAND = "fuse-lora"  # in the manifest
ADAPTER = "fused"
CARD_NAME = "README.md"
DOWN = re.compile(r"(lora_A|lora[._]down|lora_linear_layer\.down|_lora\.down)\.weight$")  # one of each pair


@dataclass(frozen=True)
class Lora:
    """One adapter file."""

    file: Path
    scale: float
    sha256: str

    def record(self) -> PassRecord:
        """For the manifest."""
        config = {"file": self.file.name, "sha256": self.sha256, "scale": self.scale}
        return PassRecord(command=COMMAND, config=config, seed=0, threads=1)


def find_lora(text: str) -> Lora:
    """Read `FILE` or `FILE:SCALE`; nothing of the file but its header and its hash.

    Raises:
        ConfigError: the scale is not a number.
        ModelError: there is no such file, or it is not a safetensors file.
    """
    name, separator, number = text.rpartition(":")
    if not separator or Path(text).is_file():
        name, number = text, "1"
    try:
        scale = float(number)
    except ValueError:
        scale = float("nan")
    if not isfinite(scale):
        raise ConfigError(
            f"--fuse-lora {text!r}: {number!r} is no scale.", mend="Write for example style.safetensors:0.8."
        )
    file = Path(name).expanduser()
    if not file.is_file():
        raise ModelError(f"there is no adapter file {name}.", mend="Give the path of a .safetensors file.")
    if file.suffix != ".safetensors":
        raise ModelError(
            f"{name} is not a safetensors file.", mend="Get the adapter as .safetensors; others are not read."
        )
    read_header(file)
    return Lora(file, scale, file_sha256(file))


def check_fusing(source: Source) -> None:
    """Whether adapters can be added to a pipeline, as far as is known without reading weights.

    Raises:
        UnsupportedError: it takes none, it is a result of dacc, or the package that reads them is not there.
    """
    import diffusers

    if read_manifest(source.path) is not None:
        raise UnsupportedError(
            f"{source.name} is a bundle.", "Adapters are added to float weights.", "Give its float source as SOURCE."
        )
    name = pipeline_class(source.path)
    if not hasattr(getattr(diffusers, name, None), "load_lora_weights"):
        raise UnsupportedError(
            f"{name} takes no adapters.", "diffusers has no loader of them for it.", "Leave --fuse-lora out."
        )
    if find_spec("peft") is None:
        raise UnsupportedError(
            "--fuse-lora needs the package peft, which is not installed.",
            mend="Install it: pip install 'dacc-diffusion[lora]'.",
        )


@contextmanager
def fused(source: Source, loras: Sequence[Lora], output: Path, reporter: Reporter) -> Iterator[Source]:
    """A copy of the pipeline with the adapters in its weights, beside `output`, as long as the context lasts.

    Raises:
        ModelError: a file is no adapter, or not one of this model.
    """
    from ..runtime.load import load_source

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.fused-") as name:
        folder = Path(name)
        pipe: Any = load_source(source, dtype="float32", device="cpu")  # the sums are made in float32
        changed: set[str] = set()
        for lora in reporter.progress(loras, "fuse adapters"):
            changed |= _fuse_(pipe, lora, source)
        carried, _ = carried_files(source.path, changed)
        if (card := source.path / CARD_NAME).is_file():
            carried[CARD_NAME] = card
        for relative, file in carried.items():
            place_file(file, folder / relative, link=True)
        for component in sorted(changed):
            _save(getattr(pipe, component), source.path / component, folder / component)
        del pipe
        yield replace(source, path=folder, calibration=None)


def _fuse_(pipe: Any, lora: Lora, source: Source) -> set[str]:
    """Add one adapter to the weights; which components it changed."""
    try:
        pipe.load_lora_weights(str(lora.file), adapter_name=ADAPTER, local_files_only=True)
        wanted = sum(bool(DOWN.search(name)) for name in _adapter_names(pipe, lora))
        found = {name: _adapted(getattr(pipe, name, None)) for name in pipe._lora_loadable_modules}
        if not wanted or sum(found.values()) != wanted:
            raise ModelError(f"{sum(found.values())} of {wanted} pairs of matrices fit")
        changed = {name for name, count in found.items() if count}
        pipe.fuse_lora(components=sorted(changed), lora_scale=lora.scale, safe_fusing=True, adapter_names=[ADAPTER])
        pipe.unload_lora_weights()
    except (DaccError, OSError, ValueError, KeyError, AttributeError, RuntimeError, TypeError, IndexError) as error:
        said = (str(error).strip().splitlines() or [repr(error)])[0].rstrip(".")
        raise ModelError(
            f"{lora.file.name} cannot be added to {source.name}: {said}.",
            "It is no adapter, or one of another model.",
            f"Give a file that was trained for {type(pipe).__name__} of this size.",
        ) from error
    return changed


def _adapter_names(pipe: Any, lora: Lora) -> list[str]:
    """Names of the file's tensors as diffusers translates them."""
    more = {"unet_config": pipe.unet.config} if hasattr(pipe, "unet") else {}
    found = pipe.lora_state_dict(str(lora.file), local_files_only=True, **more)
    return list(found[0] if isinstance(found, tuple) else found)


def _adapted(model: Any) -> int:
    """Layers of a model that hold the adapter."""
    if model is None:
        return 0
    return sum(ADAPTER in getattr(layer, "lora_A", ()) for layer in model.modules())


def _save(model: Any, stored: Path, folder: Path) -> None:
    """Write a component with every tensor in the type in which its source has it."""
    types = {name: tensor.dtype for name, tensor in stored_tensors(stored).items()}
    for name, parameter in model.named_parameters():
        if name in types:
            parameter.data = parameter.data.to(torch_dtype(types[name]))
    model.save_pretrained(folder, safe_serialization=True)
