"""Folders as a whole: list a pipeline's files, place one cheaply in another folder, swap a finished folder in."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from .cache_plan import CORRECTION_NAME
from .calibration import CALIBRATION_NAME
from .errors import BundleError, ConfigError
from .manifest import MANIFEST_NAME, UNHASHED
from .safe_read import PICKLE_SUFFIXES, checked_link

FICLONE = 0x40049409  # Linux: let two files share their blocks until one of them is changed
MAX_DEPTH = 8  # of folders in a pipeline; a deeper one is a circle of links
OWN_MARKS = (MANIFEST_NAME, "model_index.json", CALIBRATION_NAME)  # what we may delete with --overwrite


def files_in(root: Path) -> Iterator[tuple[str, Path]]:
    """(relative posix name, path) of every file below `root`, sorted, without hidden files and folders.

    Raises:
        BundleError: a link leaves the folder (other than into the Hub cache it belongs to).
    """
    yield from _walk(root, root, "")


def _walk(folder: Path, root: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    if prefix.count("/") > MAX_DEPTH:
        raise BundleError(f"{folder} is nested too deep.", mend="Remove the link that leads back into its own folder.")
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or entry.name == "__pycache__":
            continue
        if entry.is_symlink():
            checked_link(entry, root)
        if entry.is_dir():
            yield from _walk(entry, root, f"{prefix}{entry.name}/")
        elif entry.is_file():
            yield prefix + entry.name, entry


def carried_files(source: Path, replaced: Collection[str]) -> tuple[dict[str, Path], list[str]]:
    """What a new bundle takes over from a pipeline whose components `replaced` are written anew.

    Returns:
        Name -> path of the files to take over, and the names of those that stay behind because they are pickled, or
        are whole checkpoints beside the pipeline.
    """
    carried: dict[str, Path] = {}
    left_out = []
    for name, file in files_in(source):
        component, _, rest = name.partition("/")
        if name in UNHASHED or (component in replaced and _is_weight_or_config(rest)):
            continue
        if name.endswith(PICKLE_SUFFIXES) or (not rest and name.endswith(".safetensors")):
            left_out.append(name)
        else:
            carried[name] = file
    return carried, left_out


def _is_weight_or_config(name: str) -> bool:
    if name == CORRECTION_NAME:  # belongs to the plan, which every pass keeps
        return False
    return name == "config.json" or name.endswith(".safetensors") or ".safetensors.index." in name


def place_file(source: Path, target: Path, *, link: bool) -> None:
    """Make `target` equal `source`: by a hard link when `link`, else by shared blocks, else by a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if link and not source.is_symlink():
        try:
            os.link(source, target)
            return
        except OSError:  # other file system, too many links, not permitted: a copy serves as well
            pass
    with source.open("rb") as reading, target.open("wb") as writing:
        try:
            fcntl.ioctl(writing.fileno(), FICLONE, reading.fileno())
            return
        except OSError:
            pass
    shutil.copyfile(source, target)


def check_replaceable(folder: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists, or that --overwrite must not delete.

    Raises:
        ConfigError: the folder exists and `overwrite` is not given, it holds something that is not ours to delete, or
            somebody works in it.
    """
    refuse_current_folder(folder)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"the output {folder} is a file or a link.", mend="Give a folder that does not exist yet.")
    if not folder.exists():
        return
    if not overwrite:
        raise ConfigError(f"the output {folder} exists.", mend="Choose another --output, or give --overwrite.")
    if any(folder.iterdir()) and not any((folder / mark).is_file() for mark in OWN_MARKS):
        raise ConfigError(
            f"the output {folder} holds something else than a pipeline.",
            "--overwrite deletes the old folder, and dacc deletes only pipelines.",
            "Choose another --output.",
        )


def refuse_current_folder(folder: Path) -> None:
    """Refuse an output that a swap would pull away from under the process, and from the shell that started it.

    Raises:
        ConfigError: the folder is the current one, or holds it.
    """
    try:
        here = Path.cwd().resolve()
    except FileNotFoundError:  # somebody has deleted it: it cannot be lost any more
        return
    if here.is_relative_to(folder.resolve()):
        raise ConfigError(
            f"the output {folder} is, or holds, the current folder.",
            "The old folder would be deleted when the new one takes its place.",
            "Choose another --output, or call dacc from elsewhere.",
        )


def swap_in(finished: Path, target: Path) -> None:
    """Rename a finished folder to `target`; an old folder there survives until the new one stands."""
    aside = _aside(target)
    restore_interrupted_swap(target)
    if target.exists():
        target.rename(aside)
    try:
        finished.rename(target)
    except BaseException:
        if aside.exists():
            aside.rename(target)
        raise
    sync_folder(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def restore_interrupted_swap(target: Path) -> None:
    """Finish what a process that died inside `swap_in` left behind: the old folder comes back, or goes for good."""
    aside = _aside(target)
    if aside.exists() and target.exists():
        shutil.rmtree(aside)
    elif aside.exists():
        aside.rename(target)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def sync_tree(folder: Path) -> None:
    """Force every file and folder below to the disk, so that a rename after this never shows empty files."""
    for parent, _, names in os.walk(folder):
        for name in names:
            sync_file(Path(parent) / name)
        sync_folder(Path(parent))


def sync_file(file: Path) -> None:
    """Force one file to the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


sync_folder = sync_file  # on POSIX a folder is opened and synced in the same way
