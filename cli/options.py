"""Options that several commands share, so that they read the same everywhere. Imports no torch."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from ..core.errors import ConfigError
from ..core.reporter import Reporter

ROOT = Path(__file__).parents[1]
DTYPES = ("auto", "float32", "bfloat16", "float16")
PREFERENCES = ("memory", "speed")
Prefer = Literal["memory", "speed"]
EMPTY_HAS_MEANING = ("prompt", "negative_prompt")  # nothing to paint, nothing to lead away from
EXIT_CODES = (
    "Exit codes: 0 done, 1 a bug, 2 usage, 3 input, 4 damaged files, 5 memory, disk or lock, "
    "6 a --require was missed, 7 unsupported, 130 interrupted."
)


class Command(TyperCommand):
    """A command whose options refuse an empty value.

    It comes from `-o "$(a command that failed)"`, and as a path it would be the current folder.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:  # in shell completion the value is still to come
            given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
            for option in self.get_params(ctx):
                value = given.get(option.name)
                empty = "" in value if isinstance(value, list) else value == ""
                if empty and option.param_type_name == "option" and option.name not in EMPTY_HAS_MEANING:
                    raise ConfigError(
                        f"{option.opts[0]} is empty.",
                        mend="Was it $(a command that failed), or a variable that is not set? Give a value, or leave "
                        "the option out.",
                    )
        return super().parse_args(ctx, args)


def examples(*lines: str, exit_codes: bool = False) -> str:
    """The end of a help page: lines to try, one below the other."""
    heading = "Examples:" if len(lines) > 1 else "Example:"
    return "\n\n".join([heading, *lines, *(["", EXIT_CODES] if exit_codes else [])])


def words(*known: str) -> Callable[[str], list[str]]:
    """Shell completion from fixed words."""
    return lambda incomplete: [word for word in known if word.startswith(incomplete)]


def files_of(folder: str) -> tuple[str, ...]:
    """Names of the method files in a folder of the package, without importing any."""
    return tuple(sorted(file.stem for file in (ROOT / folder).glob("*.py") if not file.stem.startswith("_")))


def complete_source(incomplete: str) -> list[str]:
    """Shell completion of a SOURCE: the zoo, and pipeline folders here. A broken zoo completes nothing."""
    from ..core.errors import DaccError
    from ..core.zoo import PREFIX, list_zoo

    try:
        zoo = [PREFIX + entry.name for entry in list_zoo() if entry.installed]
    except DaccError:
        zoo = []
    near = Path(incomplete).parent if "/" in incomplete else Path()
    here = sorted(str(index.parent) for index in near.glob("*/model_index.json"))
    return [word for word in [*zoo, *here] if word.startswith(incomplete)]


def check_place(output: Path | None) -> Path | None:
    """Refuse an output below a file, before any work is done.

    Raises:
        ConfigError: it cannot be made there.
    """
    if output is not None:
        nearest = next((parent for parent in output.absolute().parents if parent.exists()), output)
        if not nearest.is_dir():
            raise ConfigError(f"--output {output}: {nearest} is not a folder.", mend="Choose another --output.")
    return output


SourceArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="SOURCE",
        help="Pipeline folder, bundle, Hub id owner/name@revision, zoo:NAME, or - for standard input. "
        "Left out: what a pipe brings, else zoo:digits-unet.",
        autocompletion=complete_source,
    ),
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder to make.", show_default="by what is done", callback=check_place),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing output, once the new one is complete.")
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Equal seeds give equal results.")]
DeviceOption = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...", autocompletion=words("auto", "cpu", "cuda"))
]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="auto (float32 on a CPU, else float16), float32, bfloat16, float16.",
        autocompletion=words(*DTYPES),
    ),
]
PreferOption = Annotated[
    str,
    typer.Option(
        "--prefer",
        help="How quantized layers run. memory: unpack weights at each call; speed: unpack once.",
        autocompletion=words(*PREFERENCES),
    ),
]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.", show_default="all cores")]
ComponentOption = Annotated[
    list[str] | None, typer.Option("--component", help="Model to treat; repeatable.", show_default="all denoisers")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A field of the method; repeatable.")
]
RequireOption = Annotated[
    list[str] | None,
    typer.Option(
        "--require",
        metavar="'psnr>=25'",
        help="Fail, and write nothing, when this is missed (psnr, ssim, relative_l2); repeatable.",
    ),
]
PromptOption = Annotated[
    list[str] | None, typer.Option("--prompt", "-p", help="What to paint; repeated ones take turns.")
]
PromptsOption = Annotated[
    Path | None, typer.Option("--prompts", metavar="FILE", help="More of them: a text file with one on each line.")
]
NegativePromptOption = Annotated[
    str | None, typer.Option("--negative-prompt", help="What guidance is to lead away from.")
]
LabelOption = Annotated[list[int] | None, typer.Option("--class", "-c", help="Class label; repeated ones take turns.")]
GuidanceOption = Annotated[
    float | None,
    typer.Option(
        "--guidance-scale",
        help="Guidance; larger: closer to the prompt or class.",
        show_default="the zoo's own, else the pipeline's",
    ),
]
HeightOption = Annotated[
    int | None,
    typer.Option("--height", min=1, help="Pixels.", show_default="the zoo's own, else the pipeline's"),
]
WidthOption = Annotated[
    int | None,
    typer.Option("--width", min=1, help="Pixels.", show_default="the zoo's own, else the pipeline's"),
]
FramesOption = Annotated[
    int | None,
    typer.Option("--num-frames", min=1, help="Frames of a clip.", show_default="the zoo's own, else the pipeline's"),
]
BatchSizeOption = Annotated[
    int, typer.Option("--batch-size", min=1, help="Images per pipeline call; larger: faster, more memory.")
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
    if "OMP_WAIT_POLICY" not in os.environ:
        # threads that wait for one whose core another program holds spin for a whole time slice, at every small
        # operation; waiting a while and then sleeping costs nothing on a quiet machine
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    for library in ("torchao", "torch.utils._pytree"):  # of one that is built for another torch, at every import
        logging.getLogger(library).setLevel(logging.ERROR)
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # torch reads it when it is imported, which is later
    reporter = Reporter(quiet=quiet, verbose=verbose, strict=strict)
    _tell_own_warnings(reporter)
    return reporter


def _tell_own_warnings(reporter: Reporter) -> None:
    """Say our warnings in one line, without the place in the source; those of others as Python does."""
    others = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if category.__module__.partition(".")[0] == "dacc":
            reporter.say(f"warning: {message}")
        else:
            others(message, category, *place, **more)

    warnings.showwarning = show


def read_prompts(given: list[str] | None, file: Path | None) -> tuple[str, ...] | None:
    """The prompts of --prompt and then those of the file of --prompts; None when there are none.

    Raises:
        ConfigError: the file cannot be read, is not text, or holds no prompt.
    """
    if file is None:
        return tuple(given) if given else None
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ConfigError(f"--prompts {file} cannot be read ({error.strerror}).", mend="Give a text file.") from None
    except UnicodeDecodeError:
        raise ConfigError(
            f"--prompts {file} is not UTF-8 text.", mend="Save it as UTF-8, one prompt on each line."
        ) from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ConfigError(f"--prompts {file} holds no prompt.", mend="Write one on each line.")
    return (*(given or ()), *found)


def print_path(path: Path, *, as_json: bool, record: dict[str, Any] | None = None) -> None:
    """The one line of stdout: a path, or the JSON record that the next command reads."""
    if as_json:
        print_document({"path": str(path), **(record or {})})
    else:
        sys.stdout.write(f"{path}\n")


def print_document(values: dict[str, Any]) -> None:
    """One JSON document on one line; the first key is its schema."""
    sys.stdout.write(json.dumps({"schema": 1, **values}, ensure_ascii=False) + "\n")


def check_running(*, dtype: str, prefer: str) -> None:
    """Check two words that would otherwise be refused only after the heavy imports."""
    parse_choice(dtype, DTYPES, "--dtype")
    parse_choice(prefer, PREFERENCES, "--prefer")


def parse_choice(value: str, known: tuple[str, ...], option: str) -> str:
    """Check a word against the known ones.

    Raises:
        ConfigError: unknown; the nearest are named.
    """
    from ..core.config import nearest

    if value not in known:
        raise ConfigError(f"{option} {value!r} is not known.", mend=nearest(value, list(known)))
    return value
