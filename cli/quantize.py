"""`dacc quantize`: integers in place of floats."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.config import build_config, parse_settings
from ..core.errors import ConfigError
from ..core.requirements import parse_requirements
from ..core.target import HERE
from ..core.target import NAMES as TARGETS
from . import options
from .options import print_path

if TYPE_CHECKING:
    from ..core.reporter import Reporter
    from ..quant.config import QuantizeConfig
    from ..quant.preview import Preview

METHODS = ("auto", *options.files_of("quant/methods"))


def mount(app: typer.Typer) -> None:
    epilog = options.examples(
        "dacc quantize",
        "dacc quantize zoo:digits-dit --bits 4 -o small",
        "dacc quantize zoo:digits-dit --bits 8 --act-bits 8",
        "dacc quantize zoo:digits-dit --layer-bits '*.ff.*=8' --require 'psnr>=25'",
        "dacc quantize zoo:digits-dit --bits 3 --dry-run",
    )
    app.command("quantize", epilog=epilog)(quantize)


def quantize(
    source: options.SourceArgument = None,
    bits: Annotated[
        str, typer.Option("--bits", "-b", metavar="2-8", help="Weight bits; fewer: smaller file, worse image.")
    ] = "4",
    number_format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="integer|nvfp4",
            help="Of 4-bit weights; nvfp4: 4-bit floats in linears, a smaller error, floats in the arithmetic.",
            autocompletion=options.words("integer", "nvfp4"),
        ),
    ] = "integer",
    act_bits: Annotated[
        str,
        typer.Option(
            metavar="16|4-8",
            help="Activation bits; 8 runs on integer products and is faster, 16 leaves activations float.",
            autocompletion=options.words("16", "8", "4"),
        ),
    ] = "16",
    act_mode: Annotated[
        str,
        typer.Option(
            metavar="auto|dynamic|per-group|static|per-step",
            help="Where activation scales come from: each input as it comes, one for a token (dynamic) or one for each "
            "group of its features (per-group); or a calibration set, one for all steps (static) or one for each "
            "(per-step). auto: what the method is made for.",
            autocompletion=options.words("auto", "dynamic", "per-group", "static", "per-step"),
        ),
    ] = "auto",
    attention_bits: Annotated[
        str,
        typer.Option(
            metavar="16|4-8",
            help="Bits of the products of attention, simulated: shows the damage, is not faster; 16 leaves them float.",
            autocompletion=options.words("16", "8", "4"),
        ),
    ] = "16",
    method: Annotated[
        str,
        typer.Option(
            "--method",
            "-m",
            help=f"{', '.join(METHODS)}; see docs/quantize.md.",
            autocompletion=options.words(*METHODS),
        ),
    ] = "auto",
    calib: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Calibration set, see dacc calibrate, for methods that need one.",
            show_default="the set given as SOURCE, else one made on the fly",
        ),
    ] = None,
    group_size: Annotated[
        str,
        typer.Option(
            metavar="auto|channel|N",
            help="Input features per scale; smaller: better image, larger file.",
            autocompletion=options.words("auto", "channel", "32", "64", "128"),
        ),
    ] = "auto",
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="Without or with zero points.", show_default="auto")
    ] = None,
    act_symmetric: Annotated[
        bool | None,
        typer.Option(
            "--act-symmetric/--act-asymmetric",
            help="Likewise for activation scales that are found at each call.",
            show_default="auto",
        ),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Only layers of these names; repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Leave these layers float; repeatable.")
    ] = None,
    layer_bits: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB=N", help="Bits of these layers, 16 to leave them float; the last match wins."),
    ] = None,
    layer_act_bits: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB=N", help="Activation bits of these layers, likewise; with --act-bits."),
    ] = None,
    fuse_lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:SCALE]",
            help="Adapter (LoRA) that is added to the weights before they are quantized; repeatable. Needs peft.",
        ),
    ] = None,
    component: options.ComponentOption = None,
    setting: options.SetOption = None,
    cache_gb: Annotated[
        str,
        typer.Option(
            metavar="GB", help="Room for what calibration calls hold between blocks, on the disk where memory is short."
        ),
    ] = "4",
    measure: Annotated[
        str,
        typer.Option(
            metavar="auto|never",
            help="Compare with the float pipeline at the end; auto: when both fit in memory.",
            autocompletion=options.words("auto", "never"),
        ),
    ] = "auto",
    target: Annotated[
        str,
        typer.Option(
            metavar="here|MACHINE",
            help="Machine that the result is for (hopper, sm90, 'RTX 4090', cpu-int8, ...): says what its products "
            "will be there.",
            autocompletion=options.words(HERE, *TARGETS),
        ),
    ] = HERE,
    require: options.RequireOption = None,
    keep_failed: Annotated[
        bool, typer.Option("--keep-failed", help="Keep what missed --require as OUTPUT.failed.")
    ] = False,
    output: options.OutputOption = None,
    overwrite: options.OverwriteOption = False,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on where an interrupted run stopped.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and the sizes; write nothing.")] = False,
    seed: options.SeedOption = 0,
    device: options.DeviceOption = "auto",
    threads: options.ThreadsOption = None,
    strict: options.StrictOption = False,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
    verbose: options.VerboseOption = False,
) -> None:
    """Write a pipeline folder whose denoiser holds packed integers, and print its path.

    Weights of 2 to 8 bits; with --act-bits 8 the layers run on integer products.

    The folder loads with dacc.load, or with plain diffusers after `import dacc`.
    """
    reporter = options.start(quiet=quiet, verbose=verbose, strict=strict, threads=threads)
    from ..quant.config import QuantizeConfig

    config = build_config(
        QuantizeConfig,
        format=number_format,
        bits=bits,
        act_bits=_integer(act_bits, "--act-bits"),
        act_mode=act_mode,
        attention_bits=_integer(attention_bits, "--attention-bits"),
        method=method,
        group_size=int(group_size) if _is_whole(group_size) else group_size,
        symmetric="auto" if symmetric is None else symmetric,
        act_symmetric="auto" if act_symmetric is None else act_symmetric,
        include=include or (),
        exclude=exclude or (),
        layer_bits=[_layer_bits("--layer-bits", text) for text in layer_bits or []],
        layer_act_bits=[_layer_bits("--layer-act-bits", text) for text in layer_act_bits or []],
        component=component or (),
        settings=parse_settings(setting or []),
        cache_gb=cache_gb,
        target=target,
        measure=measure,
        seed=seed,
    )
    if dry_run:
        parse_requirements(tuple(require or ()), "quantize", measure=config.measure)
        _show_preview(source, config, calib, device, fuse_lora or [], reporter, as_json=json)
        return
    from ..quant.api import quantize_pipeline

    path = quantize_pipeline(
        source,
        config,
        calib=calib,
        output=output,
        overwrite=overwrite,
        resume=resume,
        device=device,
        require=tuple(require or ()),
        keep_failed=keep_failed,
        fuse_lora=fuse_lora or (),
        reporter=reporter,
    )
    print_path(path, as_json=json, record=_record(path))


def _show_preview(
    source: str | None,
    config: QuantizeConfig,
    calib: Path | None,
    device: str,
    fuse_lora: list[str],
    reporter: Reporter,
    *,
    as_json: bool,
) -> None:
    from ..quant.preview import preview_quantization

    preview = preview_quantization(source, config, calib=calib, device=device, fuse_lora=fuse_lora, reporter=reporter)
    if as_json:
        options.print_document(preview.model_dump(mode="json"))
        return
    for name, component in preview.components.items():
        share = component.bytes_after / component.bytes_fp32
        sys.stdout.write(
            f"{name} ({component.class_name}): {component.parameters / 1e6:.1f} M parameters, "
            f"{component.bytes_fp32 / 1e6:.1f} MB in float32 -> {component.bytes_after / 1e6:.1f} MB ({share:.3f})\n"
        )
        for scheme, layers in component.schemes.items():
            sys.stdout.write(f"  {layers:5} layers  {scheme}{_runs_as(preview, scheme)}\n")
        for reason, layers in component.skipped.items():
            sys.stdout.write(f"  {layers:5} layers  float: {reason}\n")


def _runs_as(preview: Preview, scheme: str) -> str:
    return f": {preview.runs_as[scheme]}" if scheme in preview.runs_as else ""


def _integer(text: str, option: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{option} {text!r} is not a whole number.", mend=f"Write for example {option} 8.") from None


def _is_whole(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _layer_bits(option: str, text: str) -> tuple[str, int]:
    glob, separator, bits = text.rpartition("=")
    if not separator or not bits.isdecimal():
        raise ConfigError(
            f"{option} {text!r} is not of the form GLOB=N.", mend=f"Write for example {option} '*.ff.*=8'."
        )
    return glob, int(bits)


def _record(path: Path) -> dict[str, object]:
    from ..core.manifest import read_manifest

    manifest = read_manifest(path)
    assert manifest is not None
    return {
        "manifest": manifest.sha256(),
        "components": {
            name: {"parameters": record.parameters, "bytes_fp32": record.bytes_fp32, "bytes": record.bytes_after}
            for name, record in manifest.components.items()
        },
        "effect": {name: effect.model_dump() for name, effect in manifest.passes[-1].effect.items()},
        "notices": manifest.passes[-1].notices,
    }
