"""The `dacc` command: mounts the subcommands, turns errors into exit codes. Imports no torch."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from typing import Annotated, Any

import typer

from .. import __version__
from ..core.errors import ConfigError, DaccError, ResourceError
from . import calibrate, evaluate, export, generate, inspect, options, prune, quantize, search_cache, verify, zoo

USAGE_ERROR = typer.BadParameter.__mro__[2]  # ClickException, from click or from typer's own copy of it
INTERRUPTED, READER_LEFT = 130, 141  # 128 + SIGINT, 128 + SIGPIPE
NO_DISK = (errno.ENOSPC, errno.EDQUOT)
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


app = typer.Typer(
    name="dacc",
    help="Make diffusers pipelines smaller and faster, and show what it costs.\n\nCommands chain: each prints the path "
    "of what it made, and the next one reads it. Messages go to standard error.",
    epilog=options.examples(
        "dacc inspect zoo:digits-dit",
        "set -o pipefail; dacc quantize zoo:digits-dit --bits 4 | dacc evaluate",
        exit_codes=True,
    ),
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (inspect, calibrate, prune, quantize, search_cache, export, generate, evaluate, verify):
    module.mount(app)
app.add_typer(zoo.app, name="zoo")
for known_command in (*app.registered_commands, *zoo.app.registered_commands):
    known_command.cls = options.Command


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dacc {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave."),
    ] = False,
) -> None:
    pass


def run() -> None:
    """Entry point of the console script: exit codes of the contract, no traceback for what a user can mend."""
    _open_closed_descriptors()
    try:
        code = int(app(prog_name="dacc", standalone_mode=False) or 0)
        sys.stdout.flush()
    except BrokenPipeError:
        code = READER_LEFT
    except SystemExit as left:  # typer and rich catch that the reader left, and leave with 1
        if not isinstance(left.__context__, BrokenPipeError):
            raise
        code = READER_LEFT
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        code = _report(error)
    if code == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    _leave(code)


def _report(error: Exception) -> int:
    """Tell what happened; the exit code."""
    if isinstance(error, USAGE_ERROR):
        return _report_usage(error)
    known = error if isinstance(error, DaccError) else _shortage(error)
    if known is None:
        traceback.print_exception(error)
        print("This is a bug in dacc. Please report it with the lines above.", file=sys.stderr)
        return 1
    mend = known.mend or (_help_of(sys.argv) if isinstance(known, ConfigError) else "")
    print("error: " + " ".join(part for part in (known.what, known.why, mend) if part), file=sys.stderr)
    return known.exit_code


def _report_usage(error: Any) -> int:
    """A wrong option or argument: one line, like every other error. Without arguments at all: the help."""
    message = str(error.format_message()).strip()
    if type(error).__name__ == "NoArgsIsHelpError":
        print(message, end="")
    else:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "dacc"
        print(f"error: {message.rstrip('.')}. See {path} --help.", file=sys.stderr)
    return int(error.exit_code)


def _help_of(arguments: list[str]) -> str:
    known = [word for word in arguments[1:2] if not word.startswith("-")]
    return f"See {' '.join(['dacc', *known, '--help'])}."


def _shortage(error: Exception) -> ResourceError | None:
    """Too little memory or disk is nobody's bug, wherever it shows."""
    # torch says so by a subclass of RuntimeError on an accelerator, by words on a CPU; neither needs importing torch
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error):
        said = str(error).strip().splitlines()
        return ResourceError(
            f"there is not enough memory{f' ({said[0]})' if said else ''}.",
            mend="Free some; or use a smaller --batch-size, --dtype bfloat16, --measure never, or --device cpu.",
        )
    if isinstance(error, OSError) and error.errno in NO_DISK:
        return ResourceError(f"the disk is full ({error}).", mend="Free some space and run the same command again.")
    if isinstance(error, OSError) and error.errno in NOT_ALLOWED:
        return ResourceError(f"a file cannot be read or written ({error}).", mend="Check its permissions.")
    return None


def _open_closed_descriptors() -> None:
    """With standard output or error closed, the next file that is opened would take its number, and our words."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def _leave(code: int) -> None:
    """Exit. What can no longer be written is dropped, else the interpreter would complain about it at its end."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    sys.exit(code)


if __name__ == "__main__":
    run()
