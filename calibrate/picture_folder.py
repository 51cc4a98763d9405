"""A folder of a user's pictures with their captions. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..core.errors import ConfigError, ModelError
from ..core.safe_read import combined_hash, file_hashes

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class PictureFolder:
    """What lies in it.

    Args:
        files: pictures in the order of their names.
        captions: one for each, or none at all.
    """

    files: tuple[Path, ...]
    captions: tuple[str, ...]

    @cached_property
    def sha256(self) -> str:
        """Hash of the pictures; captions are known as prompts."""
        return combined_hash(file_hashes({file.name: file for file in self.files}))


def read_folder(folder: Path) -> PictureFolder:
    """The pictures of a folder, and from `NAME.txt` beside `NAME.png` what they show.

    Raises:
        ModelError: there is no such folder.
        ConfigError: it has no pictures, or captions for some of them only or that are not UTF-8 text.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder.", mend="Give --images a folder of pictures.")
    files = tuple(sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES))
    if not files:
        raise ConfigError(
            f"{folder} holds no pictures.", mend=f"Known are {', '.join(suffix[1:] for suffix in SUFFIXES)}."
        )
    beside = [file.with_suffix(".txt") for file in files]
    missing = [file for file, text in zip(files, beside, strict=True) if not text.is_file()]
    if 0 < len(missing) < len(files):
        raise ConfigError(
            f"{len(missing)} of {len(files)} pictures in {folder} have no caption, {missing[0].name} for one.",
            mend="Write NAME.txt beside each of them, or beside none.",
        )
    if missing:
        return PictureFolder(files, ())
    return PictureFolder(files, tuple(map(_caption, beside)))


def _caption(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ConfigError(f"the caption {file} is not UTF-8 text.", mend="Save it as UTF-8.") from None
