"""`dacc calibrate`: run the full-precision pipeline and keep what enters its denoiser."""

from __future__ import annotations

import json as json_text
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.calibration import read_calibration
from ..core.config import build_config, parse_settings
from ..core.errors import ConfigError
from . import options
from .options import print_path

STRATEGIES = tuple(name.replace("_", "-") for name in options.files_of("calibrate/strategies"))
INPUT_FORM = 'Write for example {"prompt": "a lighthouse", "negative_prompt": "blurry"} or {"class": 3} on each line.'


def mount(app: typer.Typer) -> None:
    epilog = options.examples(
        "dacc calibrate zoo:digits-dit -o inputs",
        "dacc calibrate zoo:digits-dit --samples 64 --timesteps 10 --seed 1",
        "dacc calibrate zoo:digits-unet --strategy ndtc --samples 256 --set form=paper",
        "dacc calibrate zoo:shapes-sd --images my-pictures --samples 64 -o mine",
        "dacc calibrate owner/name --prompts captions.txt --store-dtype bfloat16 --budget-gb 8",
    )
    app.command("calibrate", epilog=epilog)(calibrate)


def calibrate(
    source: options.SourceArgument = None,
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy",
            help=f"Which calls of the run are kept: {', '.join(STRATEGIES)}; see docs/calibrate.md.",
            autocompletion=options.words(*STRATEGIES),
        ),
    ] = "uniform",
    timesteps: Annotated[
        int | None,
        typer.Option(
            "--timesteps",
            min=1,
            help="Calls kept of each run; more: better statistics, larger set.",
            show_default="20, for --strategy uniform",
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", "-n", min=1, help="Pictures; more: better statistics, longer, larger set.")
    ] = 32,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, help="Solver steps of the run.", show_default="the zoo's own, else 50"),
    ] = None,
    prompt: options.PromptOption = None,
    prompts: options.PromptsOption = None,
    inputs: Annotated[
        Path | None,
        typer.Option(
            "--inputs",
            metavar="FILE.jsonl",
            help='One {"prompt": ..., "negative_prompt": ...} or {"class": ...} on each line; they take turns.',
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            "--images",
            metavar="FOLDER",
            help="Pictures that take the place of what the runs would draw; NAME.txt beside NAME.png is its prompt.",
        ),
    ] = None,
    negative_prompt: options.NegativePromptOption = None,
    label: options.LabelOption = None,
    guidance_scale: options.GuidanceOption = None,
    height: options.HeightOption = None,
    width: options.WidthOption = None,
    num_frames: options.FramesOption = None,
    batch_size: options.BatchSizeOption = 8,
    budget_gb: Annotated[
        float, typer.Option("--budget-gb", help="What the set may take; else fewer samples are run.")
    ] = 4.0,
    store_dtype: Annotated[
        str,
        typer.Option(
            "--store-dtype",
            metavar="as-is|bfloat16|float16",
            help="Of large float tensors in the set; 16 bits: half the size, inputs a little off.",
            autocompletion=options.words("as-is", "bfloat16", "float16"),
        ),
    ] = "as-is",
    component: options.ComponentOption = None,
    setting: options.SetOption = None,
    output: options.OutputOption = None,
    overwrite: options.OverwriteOption = False,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on where an interrupted run stopped.")
    ] = True,
    seed: options.SeedOption = 0,
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "float32",
    threads: options.ThreadsOption = None,
    strict: options.StrictOption = False,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
    verbose: options.VerboseOption = False,
) -> None:
    """Record what enters the denoiser while the pipeline samples, and print the folder's path.

    The run is the real one, in full precision, with the pipeline's own scheduler and guidance.

    The folder is what calibrated methods read; as a SOURCE it means the pipeline that it was made from.
    """
    reporter = options.start(quiet=quiet, verbose=verbose, strict=strict, threads=threads)
    options.parse_choice(dtype, options.DTYPES, "--dtype")
    given: dict[str, Any] = {
        "prompts": options.read_prompts(prompt, prompts),
        "negative_prompt": negative_prompt,
        "class_labels": tuple(label) if label else None,
    }
    if inputs is not None:
        if any(value is not None for value in given.values()):
            raise ConfigError(
                "--inputs stands in the place of --prompt, --prompts, --negative-prompt and --class.",
                mend="Give one or the other.",
            )
        given = read_inputs(inputs)
    from ..calibrate.api import calibrate_pipeline
    from ..calibrate.config import CalibrateConfig

    config = build_config(
        CalibrateConfig,
        strategy=strategy,
        timesteps=timesteps,
        samples=samples,
        steps=steps,
        images=images,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
        num_frames=num_frames,
        batch_size=batch_size,
        store_dtype=store_dtype,
        budget_gb=budget_gb,
        component=component or (),
        seed=seed,
        settings=parse_settings(setting or []),
        **given,
    )
    path = calibrate_pipeline(
        source,
        config,
        output=output,
        overwrite=overwrite,
        resume=resume,
        device=device,
        dtype=dtype,
        reporter=reporter,
    )
    print_path(path, as_json=json, record=_record(path))


def read_inputs(file: Path) -> dict[str, Any]:
    """Prompts with their negative prompts, or classes, of a JSON Lines file.

    Raises:
        ConfigError: the file cannot be read, or a line is neither the one nor the other, or they are mixed.
    """
    lines = list(_objects(file))
    kinds = {"class" if "class" in line else "prompt" for line in lines}
    if len(kinds) != 1:
        found = "mixes prompts and classes" if kinds else "holds no input"
        raise ConfigError(f"--inputs {file} {found}.", mend=INPUT_FORM)
    if kinds == {"class"}:
        return {"class_labels": tuple(line["class"] for line in lines)}
    negative = tuple(line.get("negative_prompt", "") for line in lines)
    return {"prompts": tuple(line["prompt"] for line in lines), "negative_prompt": negative if any(negative) else None}


def _objects(file: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # JSON texts may hold U+2028 and other line ends
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--inputs {file} cannot be read ({error}).", mend="Give a UTF-8 text file.") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found = json_text.loads(line)
        except (ValueError, RecursionError):
            found = None
        if not _is_input(found):
            raise ConfigError(f"--inputs {file}, line {number}, is no input: {line.strip()[:60]}.", mend=INPUT_FORM)
        yield found


def _is_input(found: Any) -> bool:
    if not isinstance(found, dict):
        return False
    if "class" in found:
        return set(found) == {"class"} and type(found["class"]) is int
    texts = all(isinstance(value, str) for value in found.values())
    return texts and {"prompt"} <= set(found) <= {"prompt", "negative_prompt"} and bool(found["prompt"].strip())


def _record(path: Path) -> dict[str, Any]:
    record = read_calibration(path)
    assert record is not None
    return {
        "calibration": record.id,
        "samples": len(record.samples),
        "calls": len({call for shard in record.shards for call in shard.calls}),
        "records": record.branches,
        "size_bytes": sum(shard.size for shard in record.shards),
        "notices": list(record.notices),
    }
