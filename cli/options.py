"""Options that several commands share, so that they read the same everywhere. Imports no torch."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import ConfigError
from ..core.reporter import Reporter

SourceArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[SOURCE]",
        help="Pipeline folder, bundle, Hub id owner/name[@revision], zoo:NAME, or - for standard input. "
        "Left out: what a pipe brings, else zoo:digits-unet.",
    ),
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder or file to make.", show_default="by what is done")
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing output, once the new one is complete.")
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Equal seeds give equal results.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto (float32 on a CPU), float32, bfloat16, float16.")]
PreferOption = Annotated[str, typer.Option("--prefer", help="memory: unpack weights at each call; speed: unpack once.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.", show_default="all cores")]
ComponentOption = Annotated[
    list[str] | None, typer.Option("--component", help="Model to treat; repeatable.", show_default="all denoisers")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A field of the method; repeatable.")
]
RequireOption = Annotated[
    list[str] | None,
    typer.Option("--require", metavar="'psnr>=25'", help="Fail, and write nothing, below this floor; repeatable."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notices.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="More detail on stderr.")]
StrictOption = Annotated[bool, typer.Option("--strict", help="Treat notices as errors.")]


def start(*, quiet: bool = False, verbose: bool = False, strict: bool = False, threads: int | None = None) -> Reporter:
    """The reporter of one command; also silences the bars and warnings of the libraries below."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # torch reads it when it is imported, which is later
    return Reporter(quiet=quiet, verbose=verbose, strict=strict)


def print_path(path: Path, *, as_json: bool, record: dict[str, Any] | None = None) -> None:
    """The one line of stdout: a path, or the JSON record that the next command reads."""
    text = json.dumps({"schema": 1, "path": str(path), **(record or {})}, ensure_ascii=False) if as_json else str(path)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def parse_choice(value: str, known: tuple[str, ...], option: str) -> str:
    """Check a word against the known ones.

    Raises:
        ConfigError: unknown; the nearest are named.
    """
    from ..core.config import nearest

    if value not in known:
        raise ConfigError(f"{option} {value!r} is not known.", mend=nearest(value, list(known)))
    return value
