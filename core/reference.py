"""The float pipeline that a bundle was made from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .manifest import read_manifest
from .reporter import Reporter
from .safe_read import weight_hash
from .source import PIPELINE_INDEX, Source, resolve_source
from .zoo import PREFIX, list_zoo


def find_reference(source: Source, reporter: Reporter) -> Source | None:
    """Where the chain of passes of a bundle started, when it is on this machine with its weights unchanged.

    Zoo pipelines are found by name, folders beside the bundle; nothing is downloaded.

    Returns:
        None for what is not a bundle, or where the pipeline is not found again.
    """
    manifest = read_manifest(source.path)
    if manifest is None:
        return None
    name = manifest.source.name
    place = name if name.startswith(PREFIX) else str(source.path.parent / name)
    if name.startswith(PREFIX):
        if not any(entry.installed and name == f"{PREFIX}{entry.name}" for entry in list_zoo()):
            return None
    elif not (Path(place) / PIPELINE_INDEX).is_file():
        return None
    origin = resolve_source(place, reporter=reporter)
    return origin if has_weights(origin.path, manifest.source.weights) else None


def has_weights(folder: Path, hashes: Mapping[str, str]) -> bool:
    """Whether a pipeline has these very weights, component -> hash."""
    return all((folder / name).is_dir() and weight_hash(folder / name) == value for name, value in hashes.items())
