"""The zoo: small trained pipelines that make every command work on a fresh offline machine.

Two are part of the package. Larger ones are only named there; `core/zoo_add.py` installs them into the user's own zoo.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from .config import Config, nearest
from .errors import BundleError, ModelError
from .folder import check_replaceable, files_in, place_file, swap_in
from .output import only_writer
from .safe_read import is_plain_name, read_json

PREFIX = "zoo:"
DEFAULT = "digits-unet"
ZOO_VARIABLE = "DACC_ZOO"  # one more folder with an index.json; its entries come first
INDEX_NAME, PROMPTS_NAME = "index.json", "prompts.json"
Prompt = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Prompts(Config):
    """`prompts.json` of a text pipeline: quality is measured on prompts that nothing was fitted to."""

    calibration: tuple[Prompt, ...] = Field(min_length=1)
    evaluation: tuple[Prompt, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_disjoint(self) -> Prompts:
        if shared := sorted(set(self.calibration) & set(self.evaluation)):
            raise ValueError(f"{shared[0]!r} is in both lists")
        return self


class ZooEntry(Config):
    """One pipeline of the zoo, as its index describes it. Further facts of the index are kept as given."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str
    path: Path
    pipeline: str
    description: str
    num_inference_steps: int
    guidance_scale: float | None = None
    conditioning: Literal["none", "class", "text"] = "none"
    classes: int | list[Any] | dict[str, Any] | None = None
    height: int | None = Field(default=None, ge=1)  # pixels; None: the pipeline's own default is right
    width: int | None = Field(default=None, ge=1)
    num_frames: int | None = Field(default=None, ge=1)  # of a clip; None: the pipeline's own, or it makes images
    judge: str | None = None  # a folder beside the pipeline's

    @field_validator("judge")
    @classmethod
    def _check_judge(cls, judge: str | None) -> str | None:
        if judge is not None and not is_plain_name(judge):
            raise ValueError(f"{judge!r} leads out of the zoo")
        return judge

    @property
    def installed(self) -> bool:
        """Whether the pipeline's files are here; an index may name pipelines that are not."""
        return (self.path / "model_index.json").is_file()

    @property
    def class_labels(self) -> tuple[int, ...]:
        """The classes that the pipeline knows; none where it takes no class."""
        known = self.classes if self.conditioning == "class" else None
        return tuple(range(known) if isinstance(known, int) else (int(value) for value in known or ()))

    @property
    def calibration_prompts(self) -> tuple[str, ...]:
        """Prompts to fit things to; none where the pipeline takes no text."""
        return self._read_prompts().calibration if self.conditioning == "text" else ()

    @property
    def evaluation_prompts(self) -> tuple[str, ...]:
        """Prompts to measure with; none where the pipeline takes no text."""
        return self._read_prompts().evaluation if self.conditioning == "text" else ()

    def _read_prompts(self) -> Prompts:
        """Read when needed: a damaged list must not hide the whole zoo."""
        file = self.path / PROMPTS_NAME
        try:
            return Prompts.model_validate(read_json(file))
        except BundleError as error:
            raise ModelError(error.what, "It holds the prompts of this zoo pipeline.", _DAMAGED) from None
        except ValidationError as error:
            raise ModelError(f"{file}: {_first_problem(error)}.", mend=_DAMAGED) from None


def list_zoo() -> list[ZooEntry]:
    """Every pipeline of the zoo, sorted by name, installed or not.

    Raises:
        ModelError: an index is damaged.
    """
    entries: dict[str, ZooEntry] = {}
    for folder in _zoo_folders():
        for entry in read_index(folder):
            known = entries.get(entry.name)
            if known is None or (entry.installed and not known.installed):
                entries[entry.name] = entry
    return sorted(entries.values(), key=lambda entry: entry.name)


def known_zoo_entry(name: str) -> ZooEntry:
    """What is known of a pipeline of the zoo, installed or not; its name with or without the prefix `zoo:`.

    Raises:
        ModelError: there is no such pipeline; the nearest names are given.
    """
    name = name.removeprefix(PREFIX)
    known = {entry.name: entry for entry in list_zoo()}
    if name not in known:
        raise ModelError(f"there is no zoo pipeline {name!r}.", mend=nearest(name, list(known)) if known else _NO_ZOO)
    return known[name]


def zoo_entry(name: str) -> ZooEntry:
    """One pipeline of the zoo that is ready to be read.

    Raises:
        ModelError: there is no such pipeline, or its files are not on this machine.
    """
    entry = known_zoo_entry(name)
    if not entry.installed:
        raise ModelError(
            f"the zoo pipeline {entry.name!r} is not installed.",
            "Its weights are not part of the installed package, only of dacc's repository.",
            "Give the folder zoo of a checkout to: dacc zoo add FOLDER.",
        )
    return entry


def copy_zoo(name: str, target: Path, *, overwrite: bool = False) -> Path:
    """Copy a pipeline of the zoo to a folder of one's own; it appears there at once or not at all.

    Raises:
        ModelError: there is no such pipeline.
        ConfigError: the target exists and `overwrite` is not given.
        BusyError: another run writes the target.
    """
    entry, absolute = zoo_entry(name), Path(os.path.abspath(target))
    check_replaceable(absolute, overwrite=overwrite)
    unfinished = absolute.with_name(f".{absolute.name}.copying")  # .partial holds the units of an interrupted pass
    with only_writer(absolute):
        check_replaceable(absolute, overwrite=overwrite)  # again: another run may have finished meanwhile
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
        try:
            for file_name, file in files_in(entry.path):
                place_file(file, unfinished / file_name, link=False)
            swap_in(unfinished, absolute)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return target


_NO_ZOO = f"Install dacc again, or name a zoo folder in {ZOO_VARIABLE}."
_DAMAGED = "Copy this zoo again."


def package_zoo() -> Path:
    """The zoo that came with the package."""
    return Path(__file__).parents[1] / "zoo"


def user_zoo() -> Path:
    """The zoo that `dacc zoo add` fills, in the user's data folder."""
    data = Path(os.environ.get("XDG_DATA_HOME", ""))  # the standard says to ignore it unless it is absolute
    return (data if data.is_absolute() else Path.home() / ".local" / "share") / "dacc" / "zoo"


def read_index(folder: Path) -> Iterator[ZooEntry]:
    """The entries of one zoo folder.

    Raises:
        ModelError: the index is damaged.
    """
    index = folder / INDEX_NAME
    raw = read_json(index)
    if not isinstance(raw, dict) or not all(isinstance(facts, dict) for facts in raw.values()):
        raise ModelError(f"{index} is not a table of pipelines.", mend=_DAMAGED)
    for name, facts in raw.items():
        if not is_plain_name(name):
            raise ModelError(f"{index} names {name!r}, which leads out of the zoo.", mend=_DAMAGED)
        try:
            yield ZooEntry(**{**facts, "name": name, "path": folder / name})
        except ValidationError as error:
            raise ModelError(f"{index}, entry {name!r}: {_first_problem(error)}.", mend=_DAMAGED) from None


def _zoo_folders() -> Iterator[Path]:
    if extra := os.environ.get(ZOO_VARIABLE):
        if not (Path(extra) / INDEX_NAME).is_file():
            raise ModelError(f"{ZOO_VARIABLE}={extra} holds no {INDEX_NAME}.", mend="Correct or unset the variable.")
        yield Path(extra)
    yield from (folder for folder in (user_zoo(), package_zoo()) if (folder / INDEX_NAME).is_file())


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else str(first["msg"])
