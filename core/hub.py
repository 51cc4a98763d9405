"""Fetching a pipeline from the Hugging Face Hub into its own cache: no pickles, no copies of the same weights."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from .errors import ModelError, ResourceError
from .manifest import MANIFEST_NAME, UNHASHED, read_manifest
from .reporter import Reporter
from .safe_read import PICKLE_SUFFIXES, VARIANTS, is_plain_name, read_json

HUB_NAME = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
COMMIT = re.compile("[0-9a-f]{40}")
TEXTS = ("*.json", "*.txt", "*.model", "*.jinja")
WEIGHTS = "*.safetensors"
VARIANT_PATTERNS = [f"*.{variant}{after}*" for variant in (*VARIANTS, "non_ema") for after in ".-"]


def download(repository: str, revision: str | None, reporter: Reporter) -> Path:
    """The snapshot folder of a pipeline, complete as far as network and cache allow; it is named after its commit.

    Raises:
        ModelError: no such repository or revision, no access, or offline and not in the cache.
    """
    first = _snapshot(repository, revision, ["model_index.json", MANIFEST_NAME])
    if not (first / "model_index.json").is_file():
        raise ModelError(f"{repository} is not a diffusers pipeline (no model_index.json).", mend="Choose another.")
    reporter.detail(f"{repository} at commit {first.name}")
    manifest = read_manifest(first)
    if manifest is not None:
        named = [name for name in manifest.files if not name.endswith(PICKLE_SUFFIXES)]
        return _snapshot(repository, first.name, [*named, *UNHASHED])
    return _pipeline(repository, first)


def cached(repository: str, revision: str) -> Path | None:
    """The snapshot folder of a commit as far as it lies in the Hub's cache; None where it does not, and for what is no
    commit: the name may come from a manifest that somebody else wrote."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if not COMMIT.fullmatch(revision):
        return None
    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True)).resolve()
    except LocalEntryNotFoundError as error:
        partial = getattr(error, "snapshot_path", None)  # as in `_snapshot`: complete for our own patterns
        return None if partial is None else Path(partial).resolve()


def _pipeline(repository: str, first: Path) -> Path:
    """Fetch the components alone: repositories often hold whole checkpoints and 16-bit variants besides."""
    components = _components(first)
    patterns = [*TEXTS, *(f"{name}/{WEIGHTS}" for name in components)]
    folder = _snapshot(repository, first.name, patterns, ignore=VARIANT_PATTERNS)
    if bare := [name for name in components if not any((folder / name).glob(WEIGHTS))]:
        folder = _snapshot(
            repository, first.name, [f"{name}/*{suffix}" for name in bare for suffix in (".json", WEIGHTS)]
        )
    return folder


def _components(folder: Path) -> list[str]:
    raw = read_json(folder / "model_index.json")
    names = raw if isinstance(raw, dict) else {}
    return [name for name, value in names.items() if isinstance(value, list) and is_plain_name(name) and name[0] != "_"]


def _snapshot(repository: str, revision: str | None, allow: list[str], ignore: list[str] | None = None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    named = f"{repository}@{revision}" if revision else repository
    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=allow,
            ignore_patterns=ignore,
            local_files_only=constants.HF_HUB_OFFLINE,  # older clients would ask the Hub for the list of files
        )
        return Path(folder).resolve()
    except GatedRepoError:
        raise ModelError(f"{named} asks for consent first.", mend="Accept its terms, then: hf auth login.") from None
    except RepositoryNotFoundError:
        raise ModelError(f"no folder or Hub model {named}.", mend="Check the name, or: hf auth login.") from None
    except RevisionNotFoundError:
        raise ModelError(f"{repository} has no revision {revision!r}.", mend="Give a branch, tag or commit.") from None
    except HFValidationError as error:
        raise ModelError(f"{named} is not a Hub name ({error}).", mend="Write owner/name[@revision].") from None
    except LocalEntryNotFoundError as error:
        partial = getattr(error, "snapshot_path", None)
        if partial is not None:  # complete for another reader's patterns; what we need of it is checked later
            return Path(partial).resolve()
        raise ModelError(
            f"there is no folder {named}, it is not in the Hub cache, and the Hub cannot be reached.",
            mend="Go online (unset HF_HUB_OFFLINE), or give the path of a local pipeline.",
        ) from None
    except (HfHubHTTPError, OSError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"the disk is full; {named} cannot be downloaded.", mend="Free some space.") from None
        raise ModelError(f"{named} cannot be downloaded ({error}).", mend="Try again later.") from None
