"""Install pipelines of another zoo folder, such as that of a checkout, into the user's own zoo."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from .errors import ModelError
from .folder import files_in, place_file, swap_in, sync_file, sync_tree
from .lock import WriterLock
from .zoo import INDEX_NAME, ZooEntry, package_zoo, read_index, user_zoo


def add_zoo(folder: Path, *, overwrite: bool = False) -> tuple[str, ...]:
    """Copy every pipeline of a zoo folder that is not installed yet, with its judge; each appears wholly or not at all.

    Args:
        folder: holds an index.json and the folders that it names; pipelines whose folders are missing are passed over.
        overwrite: copy all of them, also in place of installed ones.

    Returns:
        Names of the pipelines that were added, sorted.

    Raises:
        ModelError: the folder is no zoo, holds none of its pipelines, or lacks the judge of one.
        ResourceError: another process is adding to the same zoo.
    """
    offered = [entry for entry in _entries(folder) if entry.installed]
    if not offered:
        raise ModelError(f"{folder} holds none of the pipelines in its {INDEX_NAME}.", mend="Copy the folder again.")
    target = user_zoo()
    settled = set() if overwrite else _settled(target)
    wanted = [entry for entry in offered if entry.name not in settled]
    if not wanted:
        return ()
    names = _folder_names(wanted, target, overwrite=overwrite)
    target.mkdir(parents=True, exist_ok=True)
    lock = WriterLock(target / ".lock")
    lock.acquire()
    try:
        _place(folder, names, target)
        _write_index(target, wanted)
    finally:
        lock.release()
    return tuple(sorted(entry.name for entry in wanted))


def _entries(folder: Path) -> list[ZooEntry]:
    if not (folder / INDEX_NAME).is_file():
        inside = (folder / "zoo" / INDEX_NAME).is_file()
        mend = f"Give {folder / 'zoo'}." if inside else "Give the folder zoo of a checkout of dacc's repository."
        raise ModelError(f"{folder} is no zoo: it holds no {INDEX_NAME}.", mend=mend)
    return list(read_index(folder))


def _settled(target: Path) -> set[str]:
    """Names that need no copy. A zoo that is only named in the environment may be gone tomorrow: it does not count."""
    folders = [folder for folder in (target, package_zoo()) if (folder / INDEX_NAME).is_file()]
    return {entry.name for folder in folders for entry in read_index(folder) if entry.installed}


def _folder_names(wanted: list[ZooEntry], target: Path, *, overwrite: bool) -> list[str]:
    """Judges first: a pipeline that is there has its judge beside it."""
    judges = dict.fromkeys(entry.judge for entry in wanted if entry.judge)
    for entry in wanted:
        if entry.judge and not (entry.path.parent / entry.judge).is_dir():
            missing = f"{entry.path.parent} lacks {entry.judge}, the judge of {entry.name}."
            raise ModelError(missing, mend="Copy the folder again.")
    return [*(name for name in judges if overwrite or not (target / name).is_dir()), *(entry.name for entry in wanted)]


def _place(folder: Path, names: Collection[str], target: Path) -> None:
    """Copy all aside, then rename one after the other."""
    aside = target / ".partial"
    shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
    try:
        for name in names:
            for file_name, file in files_in(folder / name):
                place_file(file, aside / name / file_name, link=False)
            sync_tree(aside / name)
        for name in names:
            swap_in(aside / name, target / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_index(target: Path, added: list[ZooEntry]) -> None:
    """The index with what was added; last, so that it never names a folder that is not there."""
    index = target / INDEX_NAME
    known = {entry.name: entry for entry in [*(read_index(target) if index.is_file() else ()), *added]}
    facts = {
        name: entry.model_dump(mode="json", exclude={"name", "path"}, exclude_unset=True)
        for name, entry in known.items()
    }
    aside = target / f".{INDEX_NAME}.partial"
    aside.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync_file(aside)
    os.replace(aside, index)
