"""What the studies share: a document of cells that goes on where it stopped, options, and tables between marks.

A study is a pydantic document with `cells` and `with_cell`; a cell has `fingerprint`, `measured` and `fid_samples`.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from dacc.core.errors import DaccError
from dacc.core.machine import describe_machine
from dacc.core.reporter import Reporter

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results.md"


def add_options(parser: argparse.ArgumentParser, record: Path) -> None:
    """The options that every study has.

    Args:
        record: its document.
    """
    parser.add_argument("--seeds", type=int, default=256, help="images compared with the float pipeline's")
    parser.add_argument("--fid-samples", type=int, default=2000, help="images for FID, on the digits; 0: no FID")
    parser.add_argument("--only-missing", action="store_true", help="leave every cell alone that is on record")
    parser.add_argument("--again", action="store_true", help="measure these cells again from the start")
    parser.add_argument("--table-only", action="store_true", help="write the tables from the JSON, run nothing")
    parser.add_argument("--steps", type=int, help="solver steps; default: the zoo's own")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path(".work/study"))
    parser.add_argument("--json", type=Path, default=record)
    parser.add_argument("--results", type=Path, default=RESULTS)


def write_between(file: Path, mark: str, blocks: Mapping[str, str]) -> list[str]:
    """Put each block between its marks, `<!-- mark:name -->` and `<!-- /mark:name -->`; returns the names."""
    text = file.read_text(encoding="utf-8")
    for name, block in blocks.items():
        begin, end = f"<!-- {mark}:{name} -->", f"<!-- /{mark}:{name} -->"
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{block}\n{end}{rest.split(end)[1]}"
    file.write_text(text, encoding="utf-8")
    return list(blocks)


def commit() -> str:
    """The commit that measured, marked when files differ from it."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def provenance() -> dict[str, Any]:
    """Where and when a cell is measured, and by what."""
    return {"machine": describe_machine(), "date": datetime.date.today().isoformat(), "commit": commit()}


def attempt(
    base: Any,
    measure: Callable[[], dict[str, Any]],
    before: Any | None,
    *,
    again: bool,
    reporter: Reporter,
    told: tuple[type[Exception], ...] = (DaccError, FloatingPointError),
    word: str = "failed",
) -> Any | None:
    """A cell with what was measured of it, or with why that could not be done: whatever breaks in one cell, the others
    are measured.

    Args:
        base: the cell without figures.
        before: the cell that is on record.
        reporter: where to say what broke.
        told: errors whose text says it all.

    Returns:
        None where only what was to be added to the cell on record failed.
    """
    try:
        return base.model_copy(update=measure())
    except Exception as error:
        status = f"{word}: {error if isinstance(error, told) else repr(error)}"
        reporter.say(status)
        if before and before.measured and before.fingerprint == base.fingerprint and not again:
            return None
        return base.model_copy(update={"status": status})


def read_study(file: Path, kind: Any) -> Any:
    """The document, or an empty one of its kind where there is none yet."""
    return kind.model_validate_json(file.read_text(encoding="utf-8")) if file.is_file() else kind()


def record_cell(file: Path, cell: Any, kind: Any) -> None:
    """Put one cell into the document; several runs of a study may share it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):
        write_study(file, read_study(file, kind).with_cell(cell))


def write_study(file: Path, study: Any) -> None:
    """Written aside and renamed: an interrupted study leaves the one before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    text = json.dumps(
        study.model_dump(mode="json", exclude_defaults=True) | {"schema": 1, "kind": study.kind}, indent=1
    )
    aside.write_text(text + "\n", encoding="utf-8")
    aside.replace(file)


def fingerprint(**facts: Any) -> str:
    """Short hash of everything that a cell's figures follow from."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def is_finished(cell: Any | None, wanted: str, fid_samples: int, *, only_missing: bool = False) -> bool:
    """Whether nothing is left to measure.

    Args:
        wanted: the fingerprint of what is asked for now.
        fid_samples: images that FID is asked for from; a cell with more is as good.
        only_missing: anything on record will do, also a failure and what was asked for differently.
    """
    if cell is None:
        return False
    if only_missing:
        return True
    return cell.measured and cell.fingerprint == wanted and cell.fid_samples >= fid_samples
