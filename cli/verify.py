"""`dacc verify`: the manifest against the files."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from ..core.errors import BundleError
from . import options


def mount(app: typer.Typer) -> None:
    epilog = options.examples("dacc quantize | dacc verify", "dacc verify my-bundle --json")
    app.command("verify", epilog=epilog)(verify)


def verify(
    source: options.SourceArgument = None,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
    verbose: options.VerboseOption = False,
) -> None:
    """Check every file of a bundle against its manifest; name each one that is damaged, missing or new."""
    reporter = options.start(quiet=quiet, verbose=verbose)
    from ..core.manifest import read_manifest
    from ..core.source import resolve_source
    from ..core.verify import verify_bundle

    # a folder is taken as it is: one that is damaged could not be resolved as a pipeline
    given = Path(source) if source else None
    folder = given if given and given.is_dir() else resolve_source(source, reporter=reporter).path
    problems = verify_bundle(folder)
    if json:
        found_problems = [{"file": found.file, "problem": found.problem} for found in problems]
        options.print_document({"path": str(folder), "intact": not problems, "problems": found_problems})
    else:
        for found in problems:
            sys.stdout.write(f"{found.file}: {found.problem}\n")
    if problems:
        read_manifest(folder)  # one that cannot be read says itself what to do; copying again mends no newer format
        raise BundleError(
            f"{folder} is damaged in {len(problems)} place{'s' * (len(problems) > 1)}.",
            mend="Copy the bundle again, or make it anew.",
        )
    if not json:
        sys.stdout.write(f"{folder}: intact\n")
