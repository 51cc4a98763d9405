"""The manifest against the files: every damaged, missing or added file of a bundle by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .cache_plan import CORRECTION_NAME
from .errors import BundleError, DaccError, ModelError
from .folder import files_in
from .manifest import MANIFEST_NAME, UNHASHED, FileRecord, Manifest, read_manifest
from .safe_read import PICKLE_SUFFIXES, checked_link, combined_hash, component_tensors, file_sha256, is_plain_name

LOADED_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)  # what a loader might pick up instead of the right file
NAMED_AT_MOST = 5


@dataclass(frozen=True)
class Problem:
    """Something in a bundle that is not as its manifest says."""

    file: str  # relative to the bundle
    problem: str


def verify_bundle(folder: str | Path, *, deep: bool = True) -> list[Problem]:
    """Compare a bundle with its manifest; an empty list means that it is intact.

    Args:
        folder: the bundle.
        deep: also read every byte and compare the hashes; without it sizes, names, links and headers are checked.

    Raises:
        ModelError: the folder is not a bundle.
    """
    folder = Path(folder)
    try:
        manifest = read_manifest(folder)
    except BundleError as error:
        return [Problem(MANIFEST_NAME, str(error))]
    if manifest is None:
        raise ModelError(
            f"{folder} is not a dacc bundle ({MANIFEST_NAME} is missing).", mend="Give a folder made by dacc."
        )
    problems = [Problem(name, text) for name, text in _all_problems(folder, manifest, deep)]
    return sorted(set(problems), key=lambda problem: (problem.file, problem.problem))


def check_bundle(folder: Path) -> Manifest | None:
    """The fast checks that every loader makes before it maps anything: names, links, sizes and headers.

    Returns:
        The manifest; None for a pipeline folder that is not a bundle, whose weight headers are checked all the same.

    Raises:
        BundleError: a file is damaged, missing or added, or the manifest is of a newer format.
    """
    manifest = read_manifest(folder)
    problems = verify_bundle(folder, deep=False) if manifest else _plain_problems(folder)
    if problems:
        named = "; ".join(f"{problem.file} {problem.problem}" for problem in problems[:NAMED_AT_MOST])
        more = f"; and {len(problems) - NAMED_AT_MOST} more" if len(problems) > NAMED_AT_MOST else ""
        advice = f"Copy it again; dacc verify {folder} checks all." if manifest else "Copy it again."
        raise BundleError(f"{folder} is damaged: {named}{more}.", mend=advice)
    return manifest


def _plain_problems(folder: Path) -> list[Problem]:
    weighty = sorted({file.parent for file in folder.glob("*/*.safetensors*")})
    return [Problem(name, text) for part in weighty for name, text in _component_problems(folder, part.name)]


def _all_problems(folder: Path, manifest: Manifest, deep: bool) -> Iterator[tuple[str, str]]:
    hashes: dict[str, str] = {}
    for name, record in manifest.files.items():
        problem = _file_problem(folder, name, record)
        if problem is None and deep:
            hashes[name] = file_sha256(folder / name)
            problem = None if hashes[name] == record.sha256 else "has another content than the manifest says"
        if problem is not None:
            yield name, problem
    yield from _added_files(folder, manifest)
    for component, treated in manifest.components.items():
        yield from _component_problems(folder, component)
        if deep and treated.weight_hash != _weight_hash(hashes, component):
            yield component, "has other weights than the manifest says"


def _file_problem(folder: Path, name: str, record: FileRecord) -> str | None:
    if not all(is_plain_name(part) for part in PurePosixPath(name).parts) or name.startswith("/"):
        return "is a name that leads out of the bundle"
    file = folder / name
    try:
        checked_link(file, folder)
    except BundleError as error:
        return _without_path(error, file)
    if not file.is_file():
        return "is missing"
    size = file.stat().st_size
    return None if size == record.size else f"has {size} bytes; the manifest says {record.size}"


def _added_files(folder: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Files that the manifest does not know and a loader would read. Others, such as pictures, are the user's."""
    try:
        for name, _ in files_in(folder):
            in_component = "/" in name and name.endswith(".json")
            if name not in manifest.files and name not in UNHASHED and (in_component or name.endswith(LOADED_SUFFIXES)):
                yield name, "is not in the manifest"
    except BundleError as error:
        yield ".", str(error)


def _component_problems(folder: Path, component: str) -> Iterator[tuple[str, str]]:
    if not is_plain_name(component):
        yield component, "is a name that leads out of the bundle"
        return
    try:
        component_tensors(folder / component)
    except DaccError as error:
        yield component, _without_path(error, folder / component)


def _without_path(error: DaccError, path: Path) -> str:
    """`unet/x.safetensors is truncated` reads better than the absolute path in front of the same words."""
    return error.what.replace(f"{path}/", "").removeprefix(f"{path} ").removesuffix(".")


def _weight_hash(hashes: dict[str, str], component: str) -> str:
    found = {
        PurePosixPath(name).name: digest
        for name, digest in hashes.items()
        if name.rpartition("/")[0] == component
        and name.endswith(".safetensors")
        and not name.endswith(f"/{CORRECTION_NAME}")
    }
    return combined_hash(found)
