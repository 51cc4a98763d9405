"""`dacc prune`: blocks that the denoiser can do without are removed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.config import build_config, parse_settings
from ..core.requirements import parse_requirements
from . import options
from .options import print_path

if TYPE_CHECKING:
    from ..core.manifest import PrunedUnit
    from ..core.reporter import Reporter
    from ..prune.config import PruneConfig

METHODS = options.files_of("prune/methods")
Row = tuple[str, ...]


def mount(app: typer.Typer) -> None:
    epilog = options.examples(
        "dacc prune --ratio 0.15",
        "dacc prune zoo:digits-dit --ratio 0.25 -o smaller",
        "dacc prune zoo:digits-dit --ratio 0.25 --dry-run",
        "dacc prune zoo:digits-dit --ratio 0.25 | dacc quantize --bits 4 | dacc evaluate --reference zoo:digits-dit",
    )
    app.command("prune", epilog=epilog)(prune)


def prune(
    source: options.SourceArgument = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            metavar="R",
            help="Share of the denoiser's parameters to remove; larger: smaller and faster, less like the source.",
            show_default="0.25, for methods that need one",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            "-m",
            help=f"{', '.join(METHODS)}; see docs/prune.md.",
            autocompletion=options.words(*METHODS),
        ),
    ] = "score",
    calib: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Calibration set, see dacc calibrate, for methods that judge blocks.",
            show_default="the set given as SOURCE, else one made on the fly",
        ),
    ] = None,
    recover: Annotated[
        int, typer.Option(metavar="STEPS", min=0, help="Train what is left for so many steps; 0: not at all.")
    ] = 0,
    strict_config: Annotated[
        bool,
        typer.Option(
            "--strict-config/--no-strict-config", help="Only what plain diffusers loads without dacc being installed."
        ),
    ] = False,
    allow_adjacent: Annotated[
        bool, typer.Option("--allow-adjacent", help="Neighbouring blocks may both go: more can be removed.")
    ] = False,
    from_reference: Annotated[
        bool,
        typer.Option("--from-reference", help="Of a quantized SOURCE, prune the float pipeline that it was made from."),
    ] = False,
    component: options.ComponentOption = None,
    setting: options.SetOption = None,
    measure: Annotated[
        str,
        typer.Option(
            metavar="auto|never",
            help="Compare with the source at the end; auto: when both fit in memory.",
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
        bool, typer.Option("--resume/--no-resume", help="Go on where an interrupted run stopped.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Judge the blocks and print what would go; write nothing.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --dry-run: the scores as a picture (PNG). Needs matplotlib."),
    ] = None,
    seed: options.SeedOption = 0,
    device: options.DeviceOption = "auto",
    threads: options.ThreadsOption = None,
    strict: options.StrictOption = False,
    json: options.JsonOption = False,
    quiet: options.QuietOption = False,
    verbose: options.VerboseOption = False,
) -> None:
    """Remove the blocks that the denoiser misses least, and print the path of the result.

    Wherever its config can tell it, the result is a pipeline that plain diffusers loads without dacc.
    """
    reporter = options.start(quiet=quiet, verbose=verbose, strict=strict, threads=threads)
    from ..prune.config import PruneConfig

    config = build_config(
        PruneConfig,
        ratio=ratio,
        method=method,
        recover=recover,
        strict_config=strict_config,
        allow_adjacent=allow_adjacent,
        component=component or (),
        settings=parse_settings(setting or []),
        measure=measure,
        seed=seed,
    )
    check_plot(plot, dry_run=dry_run)
    if dry_run:
        parse_requirements(tuple(require or ()), "prune", measure=config.measure)
        _show_preview(source, config, calib, device, plot, reporter, from_reference=from_reference, as_json=json)
        return
    from ..prune.api import prune_pipeline

    path = prune_pipeline(
        source,
        config,
        calib=calib,
        output=output,
        overwrite=overwrite,
        resume=resume,
        device=device,
        require=tuple(require or ()),
        keep_failed=keep_failed,
        from_reference=from_reference,
        reporter=reporter,
    )
    print_path(path, as_json=json, record=_record(path))


def check_plot(plot: Path | None, *, dry_run: bool) -> None:
    """Refuse a picture of nothing, and one that cannot be written.

    Raises:
        ConfigError: --plot without --dry-run, or in a folder that is not there.
    """
    from ..core.errors import ConfigError

    if plot is not None and not dry_run:
        raise ConfigError("--plot goes with --dry-run.", mend="The scores of a result are in its manifest.")
    if plot is not None and not plot.absolute().parent.is_dir():
        raise ConfigError(f"--plot {plot}: there is no such folder.", mend="Make it first.")


def _show_preview(
    source: str | None,
    config: PruneConfig,
    calib: Path | None,
    device: str,
    plot: Path | None,
    reporter: Reporter,
    *,
    from_reference: bool,
    as_json: bool,
) -> None:
    from ..prune.preview import picture, preview_pruning

    preview = preview_pruning(
        source, config, calib=calib, device=device, from_reference=from_reference, reporter=reporter
    )
    if plot is not None:
        many = len(preview.components) > 1  # two denoisers of one class have units of the same names
        units = {
            f"{component}.{name}" if many else name: unit
            for component, previewed in preview.components.items()
            for name, unit in previewed.units.items()
        }
        plot.write_bytes(picture(units, f"{preview.source}: {', '.join(preview.components)}"))
        reporter.say(f"plot: {plot}")
    if as_json:
        options.print_document(preview.model_dump(mode="json"))
        return
    for name, component in preview.components.items():
        share = 1 - component.parameters_after / component.parameters_before
        changed = ", ".join(f"{field} {value}" for field, value in component.config.items())
        sys.stdout.write(
            f"{name} ({component.class_name}): {component.parameters_before / 1e6:.2f} M parameters -> "
            f"{component.parameters_after / 1e6:.2f} M ({share:.1%} fewer){'; ' + changed if changed else ''}\n"
        )
        for line in _table(component.units):
            sys.stdout.write(f"  {line}\n")
        if component.identity_modules:
            sys.stdout.write(f"  identity modules: {', '.join(component.identity_modules)}\n")
        if component.error is not None:
            adds = f", {component.additivity:.2f} times the sum of the scores" if component.additivity else ""
            sys.stdout.write(f"  relative squared error of the outputs: {component.error:.4g}{adds}\n")


def _table(units: dict[str, PrunedUnit]) -> list[str]:
    """Rows of plain columns, the head first; columns without any value are left out."""
    head = ("", "parameters", "MACs", "score", "content", "motion", "unit")
    rows = [_row(name, unit) for name, unit in units.items()]
    shown = [place for place in range(len(head)) if place == 0 or any(row[place] for row in rows)]
    widths = {place: max(len(row[place]) for row in (head, *rows)) for place in shown}
    return [
        "  ".join(
            row[place].ljust(widths[place]) if place in (0, 6) else row[place].rjust(widths[place]) for place in shown
        ).rstrip()
        for row in (head, *rows)
    ]


def _row(name: str, unit: PrunedUnit) -> Row:
    numbers = [f"{value:.4g}" if value is not None else "" for value in (unit.score, unit.content, unit.motion)]
    macs = f"{unit.macs / 1e6:.1f} M" if unit.macs is not None else ""
    return ("goes" if unit.removed else "stays", f"{unit.parameters / 1e6:.3f} M", macs, *numbers, name)


def _record(path: Path) -> dict[str, object]:
    from ..core.manifest import read_manifest

    manifest = read_manifest(path)
    assert manifest is not None
    return {
        "manifest": manifest.sha256(),
        "components": {
            name: {
                "method": record.pruning.method,
                "parameters_before": record.pruning.parameters_before,
                "parameters_after": record.pruning.parameters_after,
                "removed": [unit for unit, found in record.pruning.units.items() if found.removed],
                "identity_modules": list(record.pruning.identity_modules),
                "error": record.pruning.error,
                "additivity": record.pruning.additivity,
                "recovery": record.pruning.recovery.model_dump() if record.pruning.recovery else None,
            }
            for name, record in manifest.components.items()
            if record.pruning
        },
        "effect": {name: effect.model_dump() for name, effect in manifest.passes[-1].effect.items()},
        "notices": manifest.passes[-1].notices,
    }
