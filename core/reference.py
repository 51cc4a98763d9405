"""The float pipeline that a bundle was made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from .errors import DaccError, ModelError
from .hub import HUB_NAME, cached
from .manifest import SourceRecord, read_manifest
from .reporter import Reporter
from .safe_read import weight_hash
from .source import PIPELINE_INDEX, Source, resolve_source
from .zoo import PREFIX, list_zoo


def find_reference(source: Source, reporter: Reporter) -> Source | None:
    """Where the chain of passes of a bundle started, when it is on this machine with its weights unchanged.

    Zoo pipelines are found by name, Hub pipelines in the Hub's cache, folders beside the bundle; nothing is downloaded.

    Returns:
        None for what is not a bundle, or where the pipeline is not found again.
    """
    manifest = read_manifest(source.path)
    place = _place_of(manifest.source, source.path) if manifest else None
    if manifest is None or place is None:
        return None
    try:
        origin = resolve_source(place, reporter=reporter)
    except DaccError:
        if manifest.source.revision is None:
            raise
        return None  # only a part of it is in the Hub's cache
    if not has_weights(origin.path, manifest.source.weights):
        return None
    if manifest.source.revision is None:
        return origin
    name = manifest.source.name  # not that of the snapshot's folder
    return replace(origin, name=name.rpartition("/")[2], identity=name, revision=manifest.source.revision, kind="hub")


def given_reference(
    given: str | Path | Source, source: Source, hashes: Mapping[str, str], reporter: Reporter
) -> Source:
    """The float pipeline that a user named.

    Args:
        source: the bundle that it belongs to.
        hashes: component -> weight hash that it must have.

    Raises:
        ModelError: there is no such pipeline, or the bundle was made from other weights.
    """
    found = given if isinstance(given, Source) else resolve_source(str(given), reporter=reporter)
    if not has_weights(found.path, hashes):
        manifest = read_manifest(source.path)
        raise ModelError(
            f"{found.name} has other weights than what {source.name} was made from.",
            mend=f"Give {manifest.source.name if manifest else 'it'} as it was then, or leave --reference out.",
        )
    return found


def has_weights(folder: Path, hashes: Mapping[str, str]) -> bool:
    """Whether a pipeline has these very weights, component -> hash."""
    return all((folder / name).is_dir() and weight_hash(folder / name) == value for name, value in hashes.items())


def _place_of(record: SourceRecord, bundle: Path) -> str | None:
    """What to give `resolve_source`, where that downloads nothing."""
    name = record.name
    if name.startswith(PREFIX):
        return name if any(entry.installed and name == f"{PREFIX}{entry.name}" for entry in list_zoo()) else None
    of_hub = record.revision is not None and HUB_NAME.fullmatch(name)
    folder = cached(name, record.revision or "") if of_hub else bundle.parent / name
    return str(folder) if folder and (folder / PIPELINE_INDEX).is_file() else None
