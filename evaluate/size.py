"""Room that denoisers, and whatever else was treated, take on disk and in memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..core.manifest import read_manifest
from ..core.pipeline import denoisers
from ..core.safe_read import resolve_shards
from ..runtime.layers import count_parameters
from .result import ComponentSize


def component_sizes(pipe: Any, folder: Path, others: Iterable[str] = ()) -> dict[str, ComponentSize]:
    """Sizes of every denoiser of a loaded pipeline, and of all that its manifest says was treated.

    Call it after a run, when derived layouts exist.

    Args:
        others: names of further components to list, where the pipeline has them: what was treated in another source.
    """
    named = {name: pipe.components.get(name) for name in (*treated_components(folder), *others)}
    models = denoisers(pipe) | {name: module for name, module in named.items() if isinstance(module, nn.Module)}
    return {
        name: ComponentSize(
            class_name=type(module).__name__,
            parameters=count_parameters(module),
            bytes_on_disk=bytes_on_disk(folder / name),
            bytes_in_memory=bytes_in_memory(module),
        )
        for name, module in models.items()
    }


def treated_components(folder: Path) -> tuple[str, ...]:
    """Components that the passes of a bundle treated; none of a pipeline that is no bundle."""
    manifest = read_manifest(folder)
    return tuple(manifest.components) if manifest else ()


def bytes_on_disk(component_folder: Path) -> int:
    """Bytes of the weight files that a loader would read."""
    return sum(file.stat().st_size for file in resolve_shards(component_folder).values())


def bytes_in_memory(model: nn.Module) -> int:
    """Bytes of all tensors of a model; layers with derived layouts count them by their own `memory_bytes()`."""
    seen: set[int] = set()
    total = 0
    for module in model.modules():
        own = getattr(module, "memory_bytes", None)
        if callable(own):
            total += own()
            continue
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if id(tensor) not in seen:  # tied weights are held once
                seen.add(id(tensor))
                total += _bytes(tensor)
    return total


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
