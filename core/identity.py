"""What a result follows from, so that a folder is taken for the result of a command only when it is.

Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from .folder import carried_files
from .manifest import Manifest, read_manifest
from .safe_read import combined_hash, file_hashes

HUB_BLOB = re.compile(r"[0-9a-f]{64}")  # large files of the Hub's cache are named by their SHA-256


def source_identity(source: Path, weights: Mapping[str, str]) -> dict[str, Any]:
    """All of a pipeline that a pass reads or carries over, and the dacc that runs.

    Other components may be larger than what is treated: their weights are read only where no one has hashed them yet.

    Args:
        weights: component -> weight hash of those that are treated.
    """
    manifest = read_manifest(source)
    files, _ = carried_files(source, weights)
    files |= {f"{name}/config.json": source / name / "config.json" for name in weights}
    known = {name: digest for name, file in files.items() if (digest := _known_hash(name, file, manifest))}
    unknown = {name: file for name, file in files.items() if name not in known}
    return {
        "weights": dict(weights),
        "files": combined_hash(known | file_hashes(unknown)),
        "manifest": manifest.sha256() if manifest else None,
        "dacc": __version__,
    }


def _known_hash(name: str, file: Path, manifest: Manifest | None) -> str | None:
    """What a manifest or the Hub's cache says of a weight file; small files can be looked at."""
    if file.suffix != ".safetensors":
        return None
    record = manifest.files.get(name) if manifest else None
    if record and record.size == file.stat().st_size:
        return record.sha256
    blob = file.resolve().name
    return blob if file.is_symlink() and HUB_BLOB.fullmatch(blob) else None
