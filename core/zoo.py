"""The embedded pipelines: small trained models that make every command work on a fresh offline machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, ValidationError

from .config import Config, nearest
from .errors import ModelError
from .folder import check_replaceable, files_in, place_file, swap_in
from .safe_read import is_plain_name, read_json

PREFIX = "zoo:"
DEFAULT = "digits-unet"
ZOO_VARIABLE = "DACC_ZOO"  # one more folder with an index.json; its entries come first
INDEX_NAME = "index.json"


class ZooEntry(Config):
    """One pipeline of the zoo, as its index describes it. Further facts of the index are kept as given."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str
    path: Path
    pipeline: str
    description: str
    num_inference_steps: int
    guidance_scale: float | None = None
    conditioning: Literal["none", "class"] = "none"
    classes: int | list[Any] | dict[str, Any] | None = None
    judge: str | None = None


def list_zoo() -> list[ZooEntry]:
    """Every pipeline of the zoo, sorted by name.

    Raises:
        ModelError: an index is damaged.
    """
    entries: dict[str, ZooEntry] = {}
    for folder in _zoo_folders():
        for entry in _read_index(folder):
            entries.setdefault(entry.name, entry)
    return sorted(entries.values(), key=lambda entry: entry.name)


def zoo_entry(name: str) -> ZooEntry:
    """One pipeline of the zoo, with or without the prefix `zoo:`.

    Raises:
        ModelError: there is no such pipeline; the nearest names are given.
    """
    name = name.removeprefix(PREFIX)
    known = {entry.name: entry for entry in list_zoo()}
    if name not in known:
        raise ModelError(f"there is no zoo pipeline {name!r}.", mend=nearest(name, list(known)) if known else _NO_ZOO)
    if not known[name].path.is_dir():
        raise ModelError(f"the folder {known[name].path} of zoo pipeline {name!r} is missing.", mend=_NO_ZOO)
    return known[name]


def copy_zoo(name: str, target: Path, *, overwrite: bool = False) -> Path:
    """Copy a pipeline of the zoo to a folder of one's own; it appears there at once or not at all.

    Raises:
        ModelError: there is no such pipeline.
        ConfigError: the target exists and `overwrite` is not given.
    """
    entry, target = zoo_entry(name), Path(os.path.abspath(target))
    check_replaceable(target, overwrite=overwrite)
    unfinished = target.with_name(f".{target.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        for file_name, file in files_in(entry.path):
            place_file(file, unfinished / file_name, link=False)
        swap_in(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


_NO_ZOO = f"Install dacc again, or name a zoo folder in {ZOO_VARIABLE}."


def _zoo_folders() -> Iterator[Path]:
    if extra := os.environ.get(ZOO_VARIABLE):
        if not (Path(extra) / INDEX_NAME).is_file():
            raise ModelError(f"{ZOO_VARIABLE}={extra} holds no {INDEX_NAME}.", mend="Correct or unset the variable.")
        yield Path(extra)
    own = Path(__file__).parents[1] / "zoo"
    if (own / INDEX_NAME).is_file():
        yield own


def _read_index(folder: Path) -> Iterator[ZooEntry]:
    index = folder / INDEX_NAME
    raw = read_json(index)
    if not isinstance(raw, dict) or not all(isinstance(facts, dict) for facts in raw.values()):
        raise ModelError(f"{index} is not a table of pipelines.", mend=_NO_ZOO)
    for name, facts in raw.items():
        if not is_plain_name(name):
            raise ModelError(f"{index} names {name!r}, which leads out of the zoo.", mend=_NO_ZOO)
        try:
            yield ZooEntry(**{**facts, "name": name, "path": folder / name})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ModelError(f"{index}, entry {name!r}: {where}: {first['msg']}.", mend=_NO_ZOO) from None
