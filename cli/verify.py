"""`dacc verify`: the manifest against the files."""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path

import typer

from ..core.errors import BundleError
from . import options


def mount(app: typer.Typer) -> None:
    app.command("verify", epilog="Example: dacc quantize | dacc verify")(verify)


def verify(
    source: options.SourceArgument = None,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
    verbose: options.VerboseOption = False,
) -> None:
    """Check every file of a bundle against its manifest; name each one that is damaged, missing or new."""
    reporter = options.start(quiet=quiet, verbose=verbose)
    from ..core.source import resolve_source
    from ..core.verify import verify_bundle

    # a folder is taken as it is: one that is damaged could not be resolved as a pipeline
    given = Path(source) if source else None
    folder = given if given and given.is_dir() else resolve_source(source, reporter=reporter).path
    problems = verify_bundle(folder)
    if json:
        report = {"schema": 1, "path": str(folder), "intact": not problems}
        report["problems"] = [{"file": found.file, "problem": found.problem} for found in problems]
        sys.stdout.write(jsonlib.dumps(report) + "\n")
    else:
        for found in problems:
            sys.stdout.write(f"{found.file}: {found.problem}\n")
    if problems:
        raise BundleError(
            f"{folder} has {len(problems)} damaged files.", mend="Copy the bundle again, or make it anew."
        )
    if not json:
        sys.stdout.write(f"{folder}: intact\n")
