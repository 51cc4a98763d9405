"""Add adapters (LoRA: Hu et al., 2021, arXiv 2106.09685) to the weights of a pipeline before these are quantized:

    W' = W + scale * (alpha / r) * B A        A (r, K), B (O, r) from the file, by diffusers' own loaders

Integers cannot take an adapter afterwards without losing it to their rounding. A pruned pipeline takes adapters that
were made for the whole one, see `fuse_pruned.py`.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import ConfigError, ModelError, UnsupportedError
from ..core.folder import carried_files, place_file
from ..core.manifest import PassRecord, read_manifest
from ..core.pipeline import pipeline_class
from ..core.reporter import Reporter
from ..core.safe_read import file_sha256, read_header
from ..core.source import Source
from ..core.tensor_file import stored_tensors, torch_dtype

if TYPE_CHECKING:
    from .fuse_pruned import Pruned, Translation

COMMAND = "fuse-lora"  # in the manifest
ADAPTER = "fused"
CARD_NAME = "README.md"
DOWN = re.compile(r"(lora_A|lora[._]down|lora_linear_layer\.down|_lora\.down)\.weight$")  # one of each pair
NAMED_AT_MOST = 6  # blocks in a notice


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
        UnsupportedError: it takes none, it is a result of dacc that was not only pruned, or the package that reads them
            is not there.
    """
    import diffusers

    manifest = read_manifest(source.path)
    if manifest and any(record.quantization or record.cache for record in manifest.components.values()):
        raise UnsupportedError(
            f"{source.name} is a bundle that was quantized, or has a cache plan.",
            "Adapters are added to float weights, before both.",
            "Give its float source as SOURCE, or what dacc prune made of it.",
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
    from .fuse_pruned import pruned_components

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.fused-") as name:
        folder = Path(name)
        pipe: Any = load_source(source, dtype="float32", device="cpu")  # the sums are made in float32
        pruned = pruned_components(pipe, read_manifest(source.path))
        changed: set[str] = set()
        for lora in reporter.progress(loras, "fuse adapters"):
            changed |= _fuse_(pipe, lora, source, pruned, reporter)
        carried, _ = carried_files(source.path, changed)
        if (card := source.path / CARD_NAME).is_file():
            carried[CARD_NAME] = card
        for relative, file in carried.items():
            place_file(file, folder / relative, link=True)
        for component in sorted(changed):
            _save(getattr(pipe, component), source.path / component, folder / component)
        del pipe
        yield replace(source, path=folder, calibration=None)


def _fuse_(pipe: Any, lora: Lora, source: Source, pruned: Mapping[str, Pruned], reporter: Reporter) -> set[str]:
    """Add one adapter to the weights; which components it changed."""
    from .fuse_pruned import reading_for

    try:
        with reading_for(pipe, pruned) as translation:
            wanted = sum(bool(DOWN.search(name)) for name in _adapter_names(pipe, lora))
            _tell_lost(translation, lora, wanted, reporter)
            pipe.load_lora_weights(str(lora.file), adapter_name=ADAPTER, local_files_only=True)
        found = {name: _adapted(getattr(pipe, name, None)) for name in pipe._lora_loadable_modules}
        if not wanted or sum(found.values()) != wanted:
            raise ValueError(f"{sum(found.values())} of {wanted} pairs of matrices fit")
        changed = {name for name, count in found.items() if count}
        pipe.fuse_lora(components=sorted(changed), lora_scale=lora.scale, safe_fusing=True, adapter_names=[ADAPTER])
        pipe.unload_lora_weights()
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, TypeError, IndexError) as error:
        said = (str(error).strip().splitlines() or [repr(error)])[0].rstrip(".")
        raise ModelError(
            f"{lora.file.name} cannot be added to {source.name}: {said}.",
            "It is no adapter, or one of another model.",
            f"Give a file that was trained for {type(pipe).__name__} of this size.",
        ) from error
    return changed


def _tell_lost(translation: Translation, lora: Lora, left: int, reporter: Reporter) -> None:
    """A notice of what is left out because its blocks are gone.

    Args:
        left: pairs of matrices that are not.

    Raises:
        ModelError: all are.
    """
    pairs = [block for name, block in translation.lost.items() if DOWN.search(name)]
    blocks = list(dict.fromkeys(pairs))
    if not blocks:
        return
    if not left:
        raise ModelError(
            f"all {len(pairs)} pairs of matrices of {lora.file.name} are for blocks that dacc prune removed.",
            "Nothing is left of it.",
            "Leave it out, or give the whole pipeline as SOURCE.",
        )
    more = f" and {len(blocks) - NAMED_AT_MOST} more" if len(blocks) > NAMED_AT_MOST else ""
    reporter.notice(
        f"{lora.file.name}: {len(pairs)} of {left + len(pairs)} pairs of matrices are left out, which are for removed "
        f"blocks: {', '.join(blocks[:NAMED_AT_MOST])}{more}"
    )


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
