"""`dacc zoo`: the trained pipelines that come with dacc."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .options import print_path

app = typer.Typer(
    help="The trained pipelines that come with dacc: list them, copy one, add those that are not installed.",
    epilog=options.examples("dacc zoo list", "dacc zoo copy digits-unet", "dacc zoo add zoo"),
    no_args_is_help=True,
)


def _complete_name(incomplete: str) -> list[str]:
    names = [word.removeprefix("zoo:") for word in options.complete_source("zoo:")]
    return [name for name in names if name.startswith(incomplete)]


@app.command("list", epilog=options.examples("dacc zoo list", "dacc zoo list --json"))
def list_pipelines(json: options.JsonOption = False) -> None:
    """Print the pipelines: name, class, whether it is installed, what it draws."""
    from ..core.zoo import list_zoo

    entries = list_zoo()
    if json:
        rows = [{**entry.model_dump(mode="json", exclude={"path"}), "installed": entry.installed} for entry in entries]
        options.print_document({"pipelines": rows})
        return
    for entry in entries:
        installed = "installed" if entry.installed else "not installed"
        sys.stdout.write(f"zoo:{entry.name:14} {entry.pipeline:24} {installed:14} {entry.description}\n")


@app.command("copy", epilog=options.examples("dacc zoo copy digits-dit -o my-digits"))
def copy(
    name: Annotated[str, typer.Argument(help="Name, with or without zoo:.", autocompletion=_complete_name)],
    output: options.OutputOption = None,
    overwrite: options.OverwriteOption = False,
    json: options.JsonOption = False,
) -> None:
    """Copy a pipeline to a folder of your own, and print its path."""
    from ..core.zoo import copy_zoo, zoo_entry

    target = output or Path(zoo_entry(name).name)
    print_path(copy_zoo(name, target, overwrite=overwrite), as_json=json)


@app.command("add", epilog=options.examples("dacc zoo add zoo", "dacc zoo add dacc/zoo --overwrite"))
def add(
    folder: Annotated[
        Path,
        typer.Argument(help="A zoo folder, with an index.json: the folder zoo of a checkout of dacc's repository."),
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Copy installed pipelines again too.")] = False,
    json: options.JsonOption = False,
) -> None:
    """Install the pipelines of a zoo folder that are not installed yet, and print their names."""
    from ..core.zoo import PREFIX, user_zoo
    from ..core.zoo_add import add_zoo

    reporter = options.start()
    added = [PREFIX + name for name in add_zoo(folder, overwrite=overwrite)]
    if not added:
        reporter.say(f"all pipelines of {folder} are installed already; nothing to do")
    if json:
        options.print_document({"folder": str(user_zoo()), "added": added})
    else:
        sys.stdout.writelines(f"{name}\n" for name in added)
