"""The float pipeline that a bundle was made from."""

from __future__ import annotations

from pathlib import Path

from .manifest import Manifest, read_manifest
from .reporter import Reporter
from .safe_read import weight_hash
from .source import PIPELINE_INDEX, Source, resolve_source
from .zoo import PREFIX


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
    if not name.startswith(PREFIX) and not (Path(place) / PIPELINE_INDEX).is_file():
        return None
    origin = resolve_source(place, reporter=reporter)
    return origin if is_reference(origin.path, manifest) else None


def is_reference(folder: Path, manifest: Manifest) -> bool:
    """Whether a pipeline has the very weights that a bundle was made from."""
    return all(
        (folder / component).is_dir() and weight_hash(folder / component) == value
        for component, value in manifest.source.weights.items()
    )
