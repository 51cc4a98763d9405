"""The calibration set of a pass: the one that was given, the one that SOURCE names, or one made on the fly."""

from __future__ import annotations

import os
from pathlib import Path

from ..core.calibration import existing_set
from ..core.errors import BundleError, BusyError, CalibrationError, ConfigError, DaccError, ModelError
from ..core.lock import wait_for_writer
from ..core.manifest import read_manifest
from ..core.reporter import Reporter
from ..core.source import Source
from .api import calibrate_pipeline, prepare
from .config import CalibrateConfig
from .store import CalibrationSet, open_calibration

CACHE_VARIABLE = "DACC_CACHE"


def calibration_of(
    source: Source,
    weights: dict[str, str],
    made: CalibrateConfig,
    given: Path | None,
    *,
    device: str,
    reporter: Reporter,
) -> CalibrationSet:
    """Open a set that fits the components in `weights` (name -> weight hash); make one when none is given.

    Args:
        made: what to run then.
        given: folder of a set.

    Raises:
        ModelError: it was made with another model.
        BundleError: it is damaged.
    """
    if given is not None:
        return given_calibration(source, weights, given, reporter)
    return _with_calls_of(weights, _on_the_fly(source, weights, made, device, reporter))


def given_calibration(source: Source, weights: dict[str, str], folder: Path, reporter: Reporter) -> CalibrationSet:
    """Open a set that somebody names for the components in `weights` (name -> weight hash).

    Raises:
        ModelError: there is none, or it was made with another model.
        BundleError: it is damaged.
    """
    before = read_manifest(source.path)
    ancestors = {name: [value] for name, value in before.source.weights.items()} if before else None
    return _with_calls_of(weights, open_calibration(folder, weights=weights, ancestors=ancestors, reporter=reporter))


def _with_calls_of(weights: dict[str, str], found: CalibrationSet) -> CalibrationSet:
    if missing := [name for name in weights if name not in found.record.branches]:
        raise ModelError(
            f"{found.folder} holds no calls of {missing[0]}; it was made with {found.record.source.name}.",
            mend="Make a set of this pipeline with dacc calibrate, of more samples, steps or timesteps.",
        )
    return found


def _on_the_fly(
    source: Source, weights: dict[str, str], config: CalibrateConfig, device: str, reporter: Reporter
) -> CalibrationSet:
    """The set in the cache, made first where it is not there."""
    request = prepare(source, config, "float32", reporter).request
    folder = cache_folder() / "calibration" / f"{source.name}-{request[:16]}"

    def make() -> CalibrationSet:
        reporter.say(f"no --calib given: making a calibration set in {folder}")
        overwrite = folder.is_dir()  # it is damaged
        try:
            calibrate_pipeline(source, config, output=folder, overwrite=overwrite, device=device, reporter=reporter)
        except (CalibrationError, ConfigError) as error:
            raise _for_another_command(error, source) from None
        return open_calibration(folder, weights=weights, reporter=reporter)

    found: CalibrationSet | None = None
    damaged = False  # in a way that sizes do not show
    while found is None:
        try:
            kept = existing_set(folder, request) and not damaged
            found = open_calibration(folder, weights=weights) if kept else make()
        except BundleError:
            if damaged:
                raise
            damaged = True
        except BusyError:
            reporter.say(f"another run is making {folder.name}; waiting for it")
            wait_for_writer(folder)
    for notice in found.record.notices:  # the same whether the set was made now or in an earlier run
        reporter.notice(notice)
    return found


def _for_another_command(error: DaccError, source: Source) -> DaccError:
    """The same, with advice that the command which needs the set can follow: it has no options for making one."""
    name = source.path if source.kind in ("folder", "bundle") else source.identity
    advice = f"Make a set with dacc calibrate {name} -o inputs, and give --calib inputs."
    return type(error)(error.what, error.why, f"{advice} For that command: {error.mend}" if error.mend else advice)


def cache_folder() -> Path:
    """`$DACC_CACHE`, else `$XDG_CACHE_HOME/dacc`, else `~/.cache/dacc`."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dacc"
