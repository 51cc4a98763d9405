"""`dacc inspect`: what a pipeline is made of and what could be done to it."""

from __future__ import annotations

import sys

import typer

from . import options


def mount(app: typer.Typer) -> None:
    epilog = options.examples(
        "dacc inspect zoo:digits-dit",
        "dacc quantize | dacc inspect",
        "dacc inspect zoo:digits-unet --json",
    )
    app.command("inspect", epilog=epilog)(inspect)


def inspect(
    source: options.SourceArgument = None,
    device: options.DeviceOption = "auto",
    threads: options.ThreadsOption = None,
    strict: options.StrictOption = False,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
    verbose: options.VerboseOption = False,
) -> None:
    """Print components, parameters, bytes, MACs per denoiser call, time shares of blocks, and what dacc could do."""
    reporter = options.start(quiet=quiet, verbose=verbose, strict=strict, threads=threads)
    from ..core.source import resolve_source

    found = resolve_source(source, reporter=reporter)  # before the heavy imports: a wrong name is answered at once
    from ..evaluate.inspection import inspect_pipeline
    from ..evaluate.report import print_inspection

    inspection = inspect_pipeline(found, device=device, reporter=reporter)
    if json:
        sys.stdout.write(inspection.model_dump_json() + "\n")
    else:
        print_inspection(inspection)
