"""Finished units of a long pass, one file each, so that an interrupted run goes on where it stopped.

Units carry a hash of their content instead of being forced to the disk one by one, which would make a pass over a
thousand layers wait for the disk a thousand times.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BundleError
from .safe_read import TensorInfo, read_header, read_header_and_metadata
from .tensor_file import StoredTensor, content_hash, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

KEY_FILE = "run_key"


class Journal:
    """Units on disk: tensors and a JSON record together in one safetensors file, which is there wholly or not at all.

    Args:
        folder: where the unit files live.
        run_key: identity of the run; units of another run are never used.
    """

    def __init__(self, folder: Path, run_key: str) -> None:
        self.folder, self.run_key = folder, run_key
        self._records: dict[str, Any] = {}

    def belongs_to_run(self) -> bool:
        """Whether the folder holds units of this very run."""
        key = self.folder / KEY_FILE
        return key.is_file() and key.read_text(encoding="utf-8") == self.run_key

    def open(self, *, resume: bool) -> None:
        """Read the finished units of an earlier run with the same key, or start empty."""
        if not (resume and self.belongs_to_run()):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / KEY_FILE).write_text(self.run_key, encoding="utf-8")
        self._records = dict(self._read_units())

    def names(self) -> set[str]:
        """Names of the finished units."""
        return set(self._records)

    def files(self) -> list[Path]:
        """Unit files on disk, in the order of their names; one may be there a moment before its name is known."""
        return sorted(self.folder.glob("[!.]*.safetensors"))

    def record(self, name: str) -> Any:
        """The record that was saved with a unit."""
        return self._records[name]

    def save(self, name: str, tensors: Mapping[str, StoredTensor | Tensor], record: Any) -> None:
        """Write one unit; a unit of the same name is replaced."""
        text = json.dumps(record, sort_keys=True)
        metadata = {"unit": name, "record": text, "sha256": content_hash(tensors)}
        write_tensors(self.file(name), tensors, metadata)
        self._records[name] = json.loads(text)

    def file(self, name: str) -> Path:
        """Where a unit lies, finished or not."""
        return self.folder / f"{sha256(name.encode()).hexdigest()[:32]}.safetensors"

    def tensors(self, name: str) -> dict[str, StoredTensor]:
        """The tensors of a finished unit, not read yet."""
        return _stored(self.file(name), read_header(self.file(name)))

    def _read_units(self) -> list[tuple[str, Any]]:
        units = []
        for file in self.files():
            try:
                header, metadata = read_header_and_metadata(file)
                intact = content_hash(_stored(file, header)) == metadata["sha256"]
                found = metadata["unit"], json.loads(metadata["record"])
            except (BundleError, KeyError, ValueError):
                intact = False
            if intact:
                units.append(found)
            else:
                file.unlink()  # the machine went down before all of it was on disk: the unit is done again
        return units


def _stored(file: Path, header: Mapping[str, TensorInfo]) -> dict[str, StoredTensor]:
    return {name: StoredTensor(file, info) for name, info in header.items()}
