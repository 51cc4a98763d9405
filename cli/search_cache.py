"""`dacc search-cache`: which calls of the denoiser may reuse what an earlier one computed."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from ..core.config import build_config, parse_settings
from . import options
from .options import print_path

METHODS = ("auto", *options.files_of("cache/methods"))


def mount(app: typer.Typer) -> None:
    epilog = options.examples(
        "dacc search-cache",
        "dacc search-cache zoo:digits-unet --speedup 2 --method deepcache -o fast",
        "dacc search-cache zoo:digits-dit --macs-ratio 0.5",
        "dacc quantize zoo:digits-unet --bits 8 | dacc search-cache --macs-ratio 0.5",
    )
    app.command("search-cache", epilog=epilog)(search_cache)


def search_cache(
    source: options.SourceArgument = None,
    speedup: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="How much faster the denoiser loop is to be than without a plan, on this machine.",
            show_default="2, unless --macs-ratio is given",
        ),
    ] = None,
    macs_ratio: Annotated[
        float | None,
        typer.Option(metavar="R", help="In its place: what the calls may cost, of the full ones; the same everywhere."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            "-m",
            help=f"{', '.join(METHODS)}; see docs/search-cache.md.",
            autocompletion=options.words(*METHODS),
        ),
    ] = "auto",
    unit: Annotated[
        str,
        typer.Option(
            metavar="UNIT",
            help="What is reused: auto, cut:BLOCK.LAYER, encoder or body of a UNet, blocks:FIRST-END of a transformer, "
            "module:NAME.",
        ),
    ] = "auto",
    steps: Annotated[
        int | None,
        typer.Option(min=2, help="Solver steps that the plan is for.", show_default="the zoo's own, else 50"),
    ] = None,
    prompt: options.PromptOption = None,
    prompts: options.PromptsOption = None,
    negative_prompt: options.NegativePromptOption = None,
    label: options.LabelOption = None,
    guidance_scale: options.GuidanceOption = None,
    height: options.HeightOption = None,
    width: options.WidthOption = None,
    num_frames: options.FramesOption = None,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="Runs to profile; more: a surer plan.")] = 8,
    batch_size: options.BatchSizeOption = 8,
    rule: Annotated[
        str,
        typer.Option(
            metavar="nearest|exact",
            help="What the plan does for other steps or solvers: follow the noise levels, or refuse.",
            autocompletion=options.words("nearest", "exact"),
        ),
    ] = "nearest",
    cost_profile: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="dacc_run.json of an earlier result, whose call times are taken in place of measuring."
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="SOURCE",
            help="The float pipeline that a quantized SOURCE was made from.",
            show_default="where its manifest says",
        ),
    ] = None,
    component: options.ComponentOption = None,
    setting: options.SetOption = None,
    measure: Annotated[
        str,
        typer.Option(
            metavar="auto|never",
            help="Compare with the source without plan at the end, in pictures and in time.",
            autocompletion=options.words("auto", "never"),
        ),
    ] = "auto",
    require: options.RequireOption = None,
    keep_failed: Annotated[
        bool, typer.Option("--keep-failed", help="Keep what missed --require as OUTPUT.failed.")
    ] = False,
    output: options.OutputOption = None,
    overwrite: options.OverwriteOption = False,
    seed: options.SeedOption = 0,
    device: options.DeviceOption = "auto",
    threads: options.ThreadsOption = None,
    strict: options.StrictOption = False,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
    verbose: options.VerboseOption = False,
) -> None:
    """Find a plan by which calls of the denoiser reuse what earlier ones computed, and print the path of the result.

    The weights stay as they are; the plan lies in the manifest, and dacc.load installs it.
    """
    reporter = options.start(quiet=quiet, verbose=verbose, strict=strict, threads=threads)
    from ..cache.config import SearchCacheConfig

    config = build_config(
        SearchCacheConfig,
        speedup=speedup,
        macs_ratio=macs_ratio,
        method=method,
        unit=unit,
        steps=steps,
        prompts=options.read_prompts(prompt, prompts),
        negative_prompt=negative_prompt,
        class_labels=tuple(label) if label else None,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
        num_frames=num_frames,
        samples=samples,
        batch_size=batch_size,
        rule=rule,
        component=component or (),
        settings=parse_settings(setting or []),
        measure=measure,
        seed=seed,
    )
    from ..cache.api import search_cache as search

    path = search(
        source,
        config,
        output=output,
        overwrite=overwrite,
        device=device,
        cost_profile=cost_profile,
        reference=reference,
        require=tuple(require or ()),
        keep_failed=keep_failed,
        reporter=reporter,
    )
    print_path(path, as_json=json, record=_record(path))


def _record(path: Path) -> dict[str, object]:
    from ..core.manifest import RUN_NAME, read_manifest

    manifest = read_manifest(path)
    assert manifest is not None
    facts = json_module.loads((path / RUN_NAME).read_text(encoding="utf-8"))
    return {
        "manifest": manifest.sha256(),
        "components": {
            name: {
                "method": record.cache.method,
                "macs_ratio": record.cache.macs_ratio,
                "codes": record.cache.plan.codes,
                **record.cache.chosen,
            }
            for name, record in manifest.components.items()
            if record.cache
        },
        "speedup": facts.get("speedup_measured"),
        "effect": {name: effect.model_dump() for name, effect in manifest.passes[-1].effect.items()},
        "notices": manifest.passes[-1].notices,
    }
