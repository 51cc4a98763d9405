"""`dacc evaluate`: quality, size, memory and speed side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..core.config import build_config
from ..core.errors import ConfigError
from . import options

METRICS = options.files_of("evaluate/metrics")
REPORT_FILES = ("evaluation.json", "samples.png")


def mount(app: typer.Typer) -> None:
    epilog = options.examples(
        "dacc quantize zoo:digits-dit | dacc evaluate --output report",
        "dacc evaluate small smaller --reference zoo:digits-dit --num 256",
        "dacc evaluate small --no-memory --no-speed --metrics psnr_ssim --json",
    )
    app.command("evaluate", epilog=epilog)(evaluate)


def evaluate(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE",
            help="What to evaluate: folders, bundles, Hub ids owner/name@revision, zoo:NAME, or - for standard input. "
            "Left out: what a pipe brings, else zoo:digits-unet.",
            autocompletion=options.complete_source,
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            "-r",
            help="SOURCE that they should equal.",
            show_default="the pipeline the first was made from",
            autocompletion=options.complete_source,
        ),
    ] = None,
    num: Annotated[int, typer.Option("--num", "-n", min=1, help="Images per source; more: narrower intervals.")] = 64,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Solver steps; fewer: faster, coarser.", show_default="the zoo's own, else 20"),
    ] = None,
    guidance_scale: options.GuidanceOption = None,
    prompt: options.PromptOption = None,
    prompts: options.PromptsOption = None,
    negative_prompt: options.NegativePromptOption = None,
    label: options.LabelOption = None,
    height: options.HeightOption = None,
    width: options.WidthOption = None,
    num_frames: options.FramesOption = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"{', '.join(METRICS)}; repeatable.",
            show_default="all that apply",
            autocompletion=options.words(*METRICS),
        ),
    ] = None,
    batch_size: options.BatchSizeOption = 16,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Time the sources in turns.")] = True,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repeats; more: steadier medians.")] = 5,
    speed_batch_size: Annotated[int, typer.Option(min=1, help="Images per timed call.")] = 1,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Measure peak memory, each source in a process of its own.")
    ] = True,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for evaluation.json and the picture samples.png.",
            callback=options.check_place,
        ),
    ] = None,
    grid_images: Annotated[int, typer.Option(min=1, help="Columns of samples.png.")] = 10,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace these two files in an existing folder.")
    ] = False,
    seed: options.SeedOption = 0,
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    prefer: options.PreferOption = "memory",
    threads: options.ThreadsOption = None,
    strict: options.StrictOption = False,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
    verbose: options.VerboseOption = False,
) -> None:
    """Compare pipelines with a reference, from the same noise: distance, FID, classes, bytes, memory, time."""
    reporter = options.start(quiet=quiet, verbose=verbose, strict=strict, threads=threads)
    options.check_running(dtype=dtype, prefer=prefer)
    for name in metrics or ():
        options.parse_choice(name, METRICS, "--metrics")
    wanted = options.read_prompts(prompt, prompts)
    _check_output(output, overwrite=overwrite)
    from ..core.source import resolve_source
    from ..core.verify import check_bundle
    from ..evaluate.config import EvaluateConfig

    config = build_config(
        EvaluateConfig,
        num=num,
        steps=steps,
        guidance_scale=guidance_scale,
        labels=tuple(label) if label else None,
        prompts=wanted,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        num_frames=num_frames,
        seed=seed,
        batch_size=batch_size,
        metrics=tuple(metrics or ()),
        speed=speed,
        speed_repeats=repeats,
        speed_batch_size=speed_batch_size,
        memory=memory,
        output=output,
        grid_images=grid_images,
        device=device,
        dtype=dtype,
        prefer=prefer,
    )
    given: list[str | None] = [*sources] if sources else [None]
    found = [resolve_source(text, reporter=reporter) for text in given]
    known = resolve_source(reference, reporter=reporter) if reference is not None else None
    for source in [*found, *([known] if known else [])]:
        check_bundle(source.path)  # before the first is sampled, which takes time
    from ..evaluate.api import evaluate_pipelines
    from ..evaluate.report import print_evaluation

    evaluation = evaluate_pipelines(found, reference=known, config=config, reporter=reporter)
    if json:
        sys.stdout.write(evaluation.model_dump_json() + "\n")
    else:
        print_evaluation(evaluation)


def _check_output(folder: Path | None, *, overwrite: bool) -> None:
    """Refuse to write over an earlier report, before anything is measured."""
    if folder is None:
        return
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"the output {folder} is a file.", mend="Give a folder with --output.")
    if not overwrite and (old := [name for name in REPORT_FILES if (folder / name).exists()]):
        raise ConfigError(f"the output {folder} holds {old[0]}.", mend="Choose another --output, or give --overwrite.")
