"""`dacc generate`: sample from any source, honouring its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from ..core.config import build_config
from . import options
from .options import print_path


def mount(app: typer.Typer) -> None:
    epilog = options.examples(
        "dacc generate zoo:digits-dit --class 3 --num 8 -o threes",
        "dacc quantize | dacc generate --num 16 --steps 20",
        "dacc generate owner/name --prompt 'a lighthouse at dusk' --num 2",
        "dacc generate owner/name --prompts prompts.txt --height 512 --width 768",
    )
    app.command("generate", epilog=epilog)(generate)


def generate(
    source: options.SourceArgument = None,
    prompt: options.PromptOption = None,
    prompts: options.PromptsOption = None,
    negative_prompt: options.NegativePromptOption = None,
    label: options.LabelOption = None,
    num: Annotated[int, typer.Option("--num", "-n", min=1, help="How many images.")] = 4,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", min=1, help="Solver steps; fewer: faster, coarser.", show_default="the zoo's own, else 50"
        ),
    ] = None,
    guidance_scale: options.GuidanceOption = None,
    height: options.HeightOption = None,
    width: options.WidthOption = None,
    num_frames: options.FramesOption = None,
    batch_size: options.BatchSizeOption = 16,
    output: options.OutputOption = None,
    overwrite: options.OverwriteOption = False,
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
    """Write PNG images into a folder and print its path."""
    reporter = options.start(quiet=quiet, verbose=verbose, strict=strict, threads=threads)
    options.check_running(dtype=dtype, prefer=prefer)
    wanted = options.read_prompts(prompt, prompts)
    from ..core.source import resolve_source

    found = resolve_source(source, reporter=reporter)  # before the heavy imports: a wrong name is answered at once
    from ..evaluate.generate import GenerateConfig, generate_images

    config = build_config(
        GenerateConfig,
        num=num,
        steps=steps,
        seed=seed,
        guidance_scale=guidance_scale,
        class_labels=tuple(label) if label else None,
        prompts=wanted,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        num_frames=num_frames,
        batch_size=batch_size,
    )
    folder = generate_images(
        found,
        config,
        output=output,
        overwrite=overwrite,
        device=device,
        dtype=dtype,
        prefer=cast(options.Prefer, prefer),
        reporter=reporter,
    )
    print_path(folder, as_json=json, record={"images": sorted(file.name for file in Path(folder).glob("*.png"))})
