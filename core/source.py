"""From the SOURCE that a command was given to a pipeline folder on this machine.

A SOURCE is a local folder, a bundle, `owner/name[@revision]` on the Hub, `zoo:NAME`, a calibration set (which means
the pipeline that it was made from), or standard input. Nothing is downloaded unless a Hub name was given, and nothing
pickled ever.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from .calibration import CALIBRATION_NAME, read_calibration
from .errors import BundleError, ModelError
from .hub import HUB_NAME, download
from .manifest import MANIFEST_NAME, RUN_NAME, read_manifest
from .piped import read_piped, something_is_piped
from .reporter import Reporter
from .safe_read import PICKLE_SUFFIXES, is_plain_name, read_json, weight_hash
from .zoo import DEFAULT, PREFIX, ZooEntry, known_zoo_entry, list_zoo, zoo_entry

PIPELINE_INDEX = "model_index.json"
WEIGHTLESS_CONFIGS = {
    "scheduler_config.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
}


@dataclass(frozen=True)
class Source:
    """A pipeline that is ready to be read."""

    path: Path  # the folder, resolved
    name: str  # short, for default outputs: digits-unet, PixArt-XL-2
    identity: str  # for manifests: zoo:digits-unet, owner/name, or the folder's name; never an absolute path
    revision: str | None  # commit hash of a Hub snapshot
    kind: Literal["folder", "bundle", "hub", "zoo"]
    calibration: Path | None = None  # the calibration set that named this pipeline


def resolve_source(text: str | None, *, reporter: Reporter, stdin: int | None = None) -> Source:
    """Find the pipeline that a command means.

    Args:
        text: what the command was given; None when nothing was. With text (other than `-`), stdin is never touched.
        reporter: told which source was chosen when that is not obvious.
        stdin: file descriptor to read from; default: the process's standard input.

    Raises:
        ModelError: there is no such folder, it is not a pipeline, a config is broken or missing, its weights are
            pickled, the Hub cannot be reached, or the command before in the pipe printed nothing.
        BundleError: its index or a config is damaged, or names something outside.
    """
    if text == "-" or (text is None and something_is_piped(stdin)):
        return _resolve_text(read_piped(stdin, reporter), reporter)
    if text is None:
        reporter.say(f"no SOURCE given: using {PREFIX}{DEFAULT}")
        return _resolve_text(PREFIX + DEFAULT, reporter)
    return _resolve_text(text, reporter)


def zoo_entry_of(source: Source) -> ZooEntry | None:
    """The zoo pipeline that a source is, or was made from; None for all others.

    A bundle needs no installed zoo: it carries the prompts itself, and only the judge is missed. One that was made from
    a zoo which this machine does not know is a pipeline like any other.
    """
    manifest = read_manifest(source.path)
    name = manifest.source.name if manifest else source.identity
    if not name.startswith(PREFIX):
        return None
    if manifest and name.removeprefix(PREFIX) not in {entry.name for entry in list_zoo()}:
        return None
    entry = known_zoo_entry(name)
    return entry if entry.installed else entry.model_copy(update={"path": source.path, "judge": None})


def component_entries(folder: Path) -> dict[str, tuple[str, str]]:
    """Component name -> (library, class) from a pipeline's index, without the components that are null.

    Raises:
        ModelError: the folder has no index, or that is no table of components of a pipeline class.
        BundleError: the index is damaged, or names something that is not a plain folder name.
    """
    index = folder / PIPELINE_INDEX
    if not index.is_file():
        raise _not_a_pipeline(folder)
    raw = read_json(index)
    if not isinstance(raw, dict):
        raise ModelError(f"{index} is not a table of components.", mend="Copy the pipeline again.")
    if not isinstance(raw.get("_class_name", ""), str):
        raise ModelError(
            f"{index} has the _class_name {raw['_class_name']!r}, which names no pipeline.",
            mend="Copy the pipeline again.",
        )
    entries = {name: value for name, value in raw.items() if not name.startswith("_") and _is_text_pair(value)}
    if outside := [name for name in entries if not is_plain_name(name)]:
        raise BundleError(f"{index} names {outside[0]!r}, which leads out of the pipeline.", mend="Do not trust it.")
    return {name: (library, class_name) for name, (library, class_name) in entries.items()}


def _is_text_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(item, str) for item in value)


def _resolve_text(text: str, reporter: Reporter) -> Source:
    if text.startswith(PREFIX):
        entry = zoo_entry(text)
        return _checked(Source(entry.path.resolve(), entry.name, PREFIX + entry.name, None, "zoo"))
    if not text:
        raise ModelError("the SOURCE is empty.", mend="Was it $(a command that failed)? See its message above.")
    path = Path(text).expanduser()
    if path.exists():
        if HUB_NAME.fullmatch(text):
            reporter.say(f"{text} is a folder here: using that, not the Hub")
        return _local(path, reporter)
    if match := HUB_NAME.fullmatch(text):
        snapshot = download(match["id"], match["revision"], reporter)
        name = match["id"].partition("/")[2]
        return _checked(Source(snapshot, name, match["id"], snapshot.name, "hub"))
    raise ModelError(f"there is no folder {text!r}, and it is not a Hub name like owner/name.", mend=_suggestion(text))


def _local(path: Path, reporter: Reporter) -> Source:
    path = path.resolve()
    if path.is_file():
        raise ModelError(
            f"{path} is a file; dacc reads pipeline folders.",
            mend="Convert a checkpoint with diffusers: Pipeline.from_single_file(...).save_pretrained(...).",
        )
    if (path / CALIBRATION_NAME).is_file() and not (path / PIPELINE_INDEX).is_file():
        return _calibrated(path, reporter)
    kind: Literal["bundle", "folder"] = "bundle" if (path / MANIFEST_NAME).is_file() else "folder"
    return _checked(Source(path, path.name, path.name, None, kind))


def _calibrated(folder: Path, reporter: Reporter) -> Source:
    """The pipeline that a calibration set was made from, with the very weights that it had.

    Raises:
        ModelError: it is not found, or has other weights now.
        BundleError: the record was changed.
    """
    record = read_calibration(folder)
    assert record is not None
    if record.id != record.identity():
        raise BundleError(
            f"{folder / CALIBRATION_NAME} is not what it was when it was written.", mend="Copy the set again."
        )
    name, revision = record.source.name, record.source.revision
    if name.startswith(PREFIX) or revision:
        source = _resolve_text(f"{name}@{revision}" if revision else name, reporter)
    else:
        places = [*_remembered_place(folder), folder.parent / name]
        found = next((place for place in places if (place / PIPELINE_INDEX).is_file()), None)
        if found is None:
            looked = " or ".join(map(str, places))
            raise ModelError(
                f"{folder} is a calibration set of {name}, which is not at {looked}.",
                mend="Give the pipeline as SOURCE.",
            )
        source = _local(found, reporter)
    for component in record.branches:
        if weight_hash(source.path / component) != record.source.weights[component]:
            raise ModelError(
                f"{folder} was made from {name}, whose {component} has other weights now.",
                mend="Give another pipeline as SOURCE, or make the set anew with dacc calibrate.",
            )
    reporter.say(f"{folder} is a calibration set of {name}: using that pipeline")
    return replace(source, calibration=folder)


def _remembered_place(folder: Path) -> list[Path]:
    """Where the pipeline lay when the set was made; the file that tells may be lost."""
    file = folder / RUN_NAME
    facts = read_json(file) if file.is_file() else None
    place = facts.get("source_path") if isinstance(facts, dict) else None
    return [Path(place)] if isinstance(place, str) else []


def _checked(source: Source) -> Source:
    """The source itself, when every component is there with its config, and none has only pickled weights.

    A bundle is left to `core/verify.py`, which names damage file by file.
    """
    if (source.path / MANIFEST_NAME).is_file():
        return source
    entries = component_entries(source.path)
    if missing := [name for name in entries if not (source.path / name).is_dir()]:
        raise ModelError(f"{source.identity} lacks the components {', '.join(missing)}.", mend=_again(source))
    for name, (library, class_name) in entries.items():
        _check_weights(source, name)
        _check_configs(source, name, library, class_name)
    return source


def _check_weights(source: Source, component: str) -> None:
    names = sorted(entry.name for entry in (source.path / component).iterdir())
    if any(name.endswith(".safetensors") for name in names):
        return
    if pickled := next((name for name in names if name.endswith(PICKLE_SUFFIXES)), None):
        raise ModelError(
            f"{source.identity} has pickled weights: {component}/{pickled}.",
            "Reading a pickle can run any code, so dacc reads safetensors only.",
            "Load it with diffusers where you trust it, then save_pretrained(folder, safe_serialization=True).",
        )
    if "config.json" in names and not WEIGHTLESS_CONFIGS & set(names):
        raise ModelError(f"{source.identity} has no weights in {component}.", mend=_again(source))


def _check_configs(source: Source, component: str, library: str, class_name: str) -> None:
    """Every config is a table of fields, and what no loader can do without is there.

    A pass copies the components that it does not treat, so their faults would show in its result only.
    """
    folder = source.path / component
    for file in (folder / "config.json", folder / "scheduler_config.json"):
        if file.is_file() and not isinstance(read_json(file), dict):
            raise ModelError(f"{file} is not a table of fields.", mend=_again(source))
    if needed := _needed_config(folder, library, class_name):
        raise ModelError(f"{source.identity} has no {component}/{needed}.", mend=_again(source))


def _needed_config(folder: Path, library: str, class_name: str) -> str | None:
    """The config that a component of a known library lacks."""
    if library == "diffusers" and class_name.endswith("Scheduler"):
        needed = "scheduler_config.json"
    elif library in ("diffusers", "transformers") and any(folder.glob("*.safetensors")):
        needed = "config.json"
    else:
        return None
    return None if (folder / needed).is_file() else needed


def _again(source: Source) -> str:
    if source.kind == "hub":
        return "Only a part of it is in the Hub cache: go online (unset HF_HUB_OFFLINE) and try again."
    return "Copy the pipeline again."


def _not_a_pipeline(folder: Path) -> ModelError:
    if (folder / "config.json").is_file() or any(folder.glob("*.safetensors")):
        around = (folder.parent / PIPELINE_INDEX).is_file()
        mend = f"Give {folder.parent} and --component {folder.name}." if around else "Give the whole pipeline folder."
        return ModelError(f"{folder} is a single component, not a pipeline ({PIPELINE_INDEX} is missing).", mend=mend)
    missing = f"({PIPELINE_INDEX} is missing)"
    return ModelError(f"{folder} is not a diffusers pipeline {missing}.", mend="Give a folder made by save_pretrained.")


def _suggestion(text: str) -> str:
    names = [entry.name for entry in list_zoo()]
    if text in names:
        return f"Did you mean {PREFIX}{text}?"
    return "Check the path, or see dacc zoo list."
