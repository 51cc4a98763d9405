"""`dacc zoo`: the embedded pipelines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .options import print_path

app = typer.Typer(
    help="The embedded pipelines: list them, copy one.",
    epilog=options.examples("dacc zoo list", "dacc zoo copy digits-unet"),
    no_args_is_help=True,
)


def _complete_name(incomplete: str) -> list[str]:
    names = [word.removeprefix("zoo:") for word in options.complete_source("zoo:")]
    return [name for name in names if name.startswith(incomplete)]


@app.command("list", epilog=options.examples("dacc zoo list", "dacc zoo list --json"))
def list_pipelines(json: options.JsonOption = False) -> None:
    """Print the embedded pipelines: name, class, what they draw."""
    from ..core.zoo import list_zoo

    entries = list_zoo()
    if json:
        rows = [entry.model_dump(mode="json", exclude={"path"}) for entry in entries]
        options.print_document({"pipelines": rows})
        return
    for entry in entries:
        sys.stdout.write(f"zoo:{entry.name:14} {entry.pipeline:14} {entry.description}\n")


@app.command("copy", epilog=options.examples("dacc zoo copy digits-dit -o my-digits"))
def copy(
    name: Annotated[str, typer.Argument(help="Name, with or without zoo:.", autocompletion=_complete_name)],
    output: options.OutputOption = None,
    overwrite: options.OverwriteOption = False,
    json: options.JsonOption = False,
) -> None:
    """Copy an embedded pipeline to a folder of your own, and print its path."""
    from ..core.zoo import copy_zoo, zoo_entry

    target = output or Path(zoo_entry(name).name)
    print_path(copy_zoo(name, target, overwrite=overwrite), as_json=json)
