"""What the command before left on standard input: a path, or its JSON record."""

from __future__ import annotations

import json
import os
import select
import stat
import sys
from pathlib import Path
from typing import Any

from .errors import ModelError
from .reporter import Reporter

MAX_BYTES = 16_000_000
PATIENCE_S = 30.0  # after so long without input the reader is told what we wait for


def something_is_piped(descriptor: int | None = None) -> bool:
    """Whether standard input is a pipe or a regular file, and not a terminal, /dev/null, a socket or closed."""
    if descriptor is None and sys.stdin is None:
        return False  # closed at start; the number 0 may by now belong to another file
    try:
        mode = os.fstat(descriptor or 0).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def read_piped(descriptor: int | None, reporter: Reporter) -> str:
    """The SOURCE that standard input names.

    Raises:
        ModelError: nothing is piped, nothing came, or it names no source.
    """
    number = descriptor or 0
    if (descriptor is None and sys.stdin is None) or os.isatty(number):
        raise ModelError("nothing is piped into this command.", mend="Give a SOURCE instead of -.")
    if not select.select([number], [], [], PATIENCE_S)[0]:
        reporter.say("waiting for the command before, which is to name the SOURCE")
    with os.fdopen(number, "rb", closefd=False) as stream:
        text = stream.read(MAX_BYTES).decode("utf-8", errors="replace").strip()
    if not text:
        raise ModelError(
            "the command before failed: it printed no path.", mend="See its message above; set -o pipefail in scripts."
        )
    return _source_in(text)


def _source_in(text: str) -> str:
    if (path := _path_in_json(text)) is not None:
        return path
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) == 1:
        return lines[0]
    for line in reversed(lines):
        if (path := _path_in_json(line)) is not None:
            return path
        if Path(line).exists():
            return line
    raise ModelError(
        f"no line of the {len(lines)} on standard input is a path.", mend="Pipe in the path of a pipeline."
    )


def _path_in_json(text: str) -> str | None:
    if not text.startswith("{"):
        return None
    try:
        record: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("path"), str):
        raise ModelError("the JSON on standard input has no key 'path'.", mend="Pipe in the --json record of a pass.")
    return str(record["path"])
