"""The `dacc` command: mounts the subcommands, turns errors into exit codes. Imports no torch."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from .. import __version__
from ..core.errors import DaccError
from . import evaluate, generate, inspect, quantize, verify, zoo

app = typer.Typer(
    name="dacc",
    help="Make diffusers pipelines smaller and faster, and show what it costs.",
    epilog="Example: set -o pipefail; dacc quantize zoo:digits-dit --bits 4 | dacc evaluate --reference zoo:digits-dit",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (inspect, quantize, generate, evaluate, verify):
    module.mount(app)
app.add_typer(zoo.app, name="zoo")


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"dacc {__version__}")
        raise typer.Exit


def run() -> None:
    """Entry point of the console script: exit codes of the contract, no traceback for what a user can mend."""
    try:
        app(standalone_mode=True)
    except DaccError as error:
        _print_error(error)
        _leave(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _leave(130)
    except BrokenPipeError:
        # the reader of our stdout has left; point stdout elsewhere so that the interpreter's last flush is quiet
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _print_error(error: DaccError) -> None:
    print("error: " + " ".join(part for part in (error.what, error.why, error.mend) if part), file=sys.stderr)


def _leave(code: int) -> None:
    sys.stderr.flush()
    sys.exit(code)
