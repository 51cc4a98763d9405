"""The folder of an export: components in another format, everything else of the pipeline as it was."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..core.cache_plan import CORRECTION_NAME
from ..core.folder import carried_files, place_file, sync_tree
from ..core.manifest import MANIFEST_NAME
from ..core.output import OutputWriter
from ..core.reporter import Reporter

RECORD_NAME = "dacc_export.json"  # what was exported, and how; no loader reads it


class ExportWriter(OutputWriter):
    """Makes one such folder, atomically.

    Args:
        source: the pipeline that is exported.
        output: the folder to make.
        replace: components that are written in another format.
        reporter: where to speak.
        overwrite: an old folder at `output` is exchanged for the new one, at the very end.
    """

    def __init__(
        self, source: Path, output: Path, *, replace: Collection[str], reporter: Reporter, overwrite: bool = False
    ) -> None:
        super().__init__(source, output, run_key="export", reporter=reporter, overwrite=overwrite, resume=False)
        self._replace = frozenset(replace)
        self._carried: dict[str, Path] = {}

    def component(self, name: str) -> Path:
        """The folder that a component is written into."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def commit(self, record: Mapping[str, Any]) -> Path:
        """Complete the folder and rename it into place."""
        for name, file in self._carried.items():
            place_file(file, self.folder / name, link=(self.source / MANIFEST_NAME).is_file())
        self.write_text(RECORD_NAME, json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
        sync_tree(self.folder)
        return self._put_in_place()

    def _prepare(self) -> None:
        self._carried, left_out = carried_files(self.source, self._replace)
        for component in self._replace:
            self._carried.pop(f"{component}/{CORRECTION_NAME}", None)  # of a plan, which is lost
        if left_out:
            self.reporter.notice(f"not carried over (pickled, or no part of the pipeline): {', '.join(left_out)}")
        self.check_disk(sum(file.stat().st_size for file in self._carried.values()))
