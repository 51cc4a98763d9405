"""`dacc export`: formats that other programs read."""

from __future__ import annotations

import json as json_format
from typing import Annotated

import typer

from ..core.config import build_config, parse_settings
from ..export.config import TARGETS, ExportConfig
from . import options
from .options import print_path


def mount(app: typer.Typer) -> None:
    epilog = options.examples(
        "dacc export small --format safetensors-bf16",
        "dacc quantize zoo:shapes-mmdit --bits 8 | dacc export --format gguf",
        "dacc export small --format gguf --set type=q5_1 --reference owner/name",
    )
    app.command("export", epilog=epilog)(export)


def export(
    source: options.SourceArgument = None,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            help=f"{', '.join(TARGETS.names())}; see docs/export.md.",
            autocompletion=options.words(*TARGETS.names()),
        ),
    ] = "safetensors-bf16",
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Go on where the format cannot hold all that the source has.")
    ] = False,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="The float pipeline, for formats that round weights anew.",
            show_default="what the bundle was made from",
        ),
    ] = None,
    component: options.ComponentOption = None,
    setting: options.SetOption = None,
    output: options.OutputOption = None,
    overwrite: options.OverwriteOption = False,
    threads: options.ThreadsOption = None,
    strict: options.StrictOption = False,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
    verbose: options.VerboseOption = False,
) -> None:
    """Write a pipeline folder whose denoiser has another program's format, and print its path."""
    reporter = options.start(quiet=quiet, verbose=verbose, strict=strict, threads=threads)
    config = build_config(
        ExportConfig,
        format=format,
        component=component or (),
        lossy=lossy,
        settings=parse_settings(setting or []),
    )
    from ..core.source import resolve_source

    found = resolve_source(source, reporter=reporter)  # before the heavy imports: a wrong name is answered at once
    from ..export.api import export_pipeline
    from ..export.folder import RECORD_NAME

    folder = export_pipeline(found, config, output=output, overwrite=overwrite, reference=reference, reporter=reporter)
    print_path(folder, as_json=json, record=json_format.loads((folder / RECORD_NAME).read_text(encoding="utf-8")))
