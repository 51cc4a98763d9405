"""`dacc search-cache`: which calls of the denoiser may reuse what an earlier one computed."""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.config import build_config, parse_settings
from ..core.requirements import parse_requirements
from . import options
from .options import print_path

if TYPE_CHECKING:
    from ..cache.config import SearchCacheConfig
    from ..core.reporter import Reporter

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
    calib: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Calibration set, see dacc calibrate: prompts, classes, guidance, steps and size that are not given "
            "here are as in its runs.",
            show_default="the set given as SOURCE, if one is",
        ),
    ] = None,
    unit: Annotated[
        str,
        typer.Option(
            metavar="UNIT",
            help="What is reused: auto, output, body, cut:BLOCK.LAYER or encoder of a UNet, blocks:FIRST-END of a "
            "transformer, module:NAME.",
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
    dtype: options.DtypeOption = "auto",
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
    resume: Annotated[
        bool, typer.Option(help="Go on from the last generation of an interrupted search of evolve.")
    ] = True,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show what would be reused, what that saves, and how many calls the target lets compute.",
        ),
    ] = False,
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
        dtype=dtype,
        rule=rule,
        component=component or (),
        settings=parse_settings(setting or []),
        measure=measure,
        seed=seed,
    )
    if dry_run:
        parse_requirements(tuple(require or ()), "search-cache", measure=config.measure)
        _show_preview(source, config, calib, device, cost_profile, reference, reporter, as_json=json)
        return
    from ..cache.api import search_cache as search

    path = search(
        source,
        config,
        calib=calib,
        output=output,
        overwrite=overwrite,
        resume=resume,
        device=device,
        cost_profile=cost_profile,
        reference=reference,
        require=tuple(require or ()),
        keep_failed=keep_failed,
        reporter=reporter,
    )
    print_path(path, as_json=json, record=_record(path))


def _show_preview(
    source: str | None,
    config: SearchCacheConfig,
    calib: Path | None,
    device: str,
    cost_profile: Path | None,
    reference: str | None,
    reporter: Reporter,
    *,
    as_json: bool,
) -> None:
    from ..cache.preview import preview_search

    preview = preview_search(
        source, config, calib=calib, device=device, cost_profile=cost_profile, reference=reference, reporter=reporter
    )
    if as_json:
        options.print_document(preview.model_dump(mode="json"))
        return
    for name, component in preview.components.items():
        for method, found in component.methods.items():
            sys.stdout.write(
                f"{name} ({component.class_name}), {method}: {found.calls} calls of {found.macs / 1e9:.3f} G MACs\n"
            )
            for unit, share in found.units.items():
                sys.stdout.write(f"  {share:6.1%} saved by a call that skips {unit}\n")
            if found.cost is not None:
                full, partial = 1000 * found.cost.full_seconds, 1000 * found.cost.partial_seconds
                sys.stdout.write(f"  {full:.1f} ms a call, {partial:.1f} ms one that skips\n")
            if found.computed is None:
                sys.stdout.write(f"  up to {found.macs_ratio:.3f} of the MACs meet the target\n")
            else:
                sys.stdout.write(
                    f"  {found.computed:g} of {found.calls} calls may compute: {found.macs_ratio:.3f} of the MACs\n"
                )
        for method, why in component.out_of_reach.items():
            sys.stdout.write(f"{name} ({component.class_name}), {method}: left out, as {why}\n")


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
