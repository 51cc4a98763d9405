"""`dacc generate`: sample from any source, honouring its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.config import build_config
from . import options
from .options import print_path


def mount(app: typer.Typer) -> None:
    app.command("generate", epilog="Example: dacc generate zoo:digits-dit --class 3 --num 8 -o threes")(generate)


def generate(
    source: options.SourceArgument = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="What to paint; repeatable.")] = None,
    label: Annotated[list[int] | None, typer.Option("--class", "-c", help="Class label; repeatable.")] = None,
    num: Annotated[int, typer.Option("--num", "-n", min=1, help="How many images.")] = 4,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Solver steps.")] = 50,
    guidance_scale: Annotated[float | None, typer.Option(help="Guidance; the pipeline's own by default.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per pipeline call.")] = 16,
    output: options.OutputOption = None,
    overwrite: options.OverwriteOption = False,
    seed: options.SeedOption = 0,
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    prefer: options.PreferOption = "memory",
    threads: options.ThreadsOption = None,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
    verbose: options.VerboseOption = False,
) -> None:
    """Write PNG images into a folder and print its path."""
    reporter = options.start(quiet=quiet, verbose=verbose, threads=threads)
    options.parse_choice(prefer, ("memory", "speed"), "--prefer")
    from ..evaluate.generate import GenerateConfig, generate_images

    config = build_config(
        GenerateConfig,
        num=num,
        steps=steps,
        seed=seed,
        guidance_scale=guidance_scale,
        class_labels=tuple(label) if label else None,
        prompts=tuple(prompt) if prompt else None,
        batch_size=batch_size,
    )
    folder = generate_images(
        source, config, output=output, overwrite=overwrite, device=device, dtype=dtype, prefer=prefer, reporter=reporter
    )
    print_path(folder, as_json=json, record={"images": sorted(file.name for file in Path(folder).glob("*.png"))})
