"""The calibration set of a quantization: the one that was given, the one that SOURCE names, or one made on the fly."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..calibrate.api import calibrate_pipeline, prepare
from ..calibrate.config import CalibrateConfig
from ..calibrate.store import CalibrationSet, open_calibration
from ..core.calibration import existing_set
from ..core.errors import ModelError
from ..core.reporter import Reporter
from ..core.source import Source

CACHE_VARIABLE = "DACC_CACHE"
ON_THE_FLY_GB = 1.0


def calibration_of(
    source: Source, weights: dict[str, str], given: Path | None, *, seed: int, device: str, reporter: Reporter
) -> CalibrationSet:
    """Open a set that fits the components in `weights` (name -> weight hash); make one when none is given.

    Raises:
        ModelError: it was made with another model.
        BundleError: it is damaged.
    """
    folder = given or _made_on_the_fly(source, weights, seed, device, reporter)
    found = open_calibration(folder, weights=weights, reporter=reporter)
    if given is None:  # the manifest is to be the same whether the set was made now or in an earlier run
        for notice in found.record.notices:
            reporter.notice(notice)
    if missing := [name for name in weights if name not in found.record.branches]:
        raise ModelError(
            f"{folder} holds no calls of {missing[0]}; it was made with {found.record.source.name}.",
            mend="Make a set of this pipeline with dacc calibrate.",
        )
    return found


def _made_on_the_fly(source: Source, weights: Iterable[str], seed: int, device: str, reporter: Reporter) -> Path:
    """The set in the cache, made first where it is not there."""
    config = CalibrateConfig(component=tuple(weights), seed=seed, budget_gb=ON_THE_FLY_GB)
    request = prepare(source, config, "float32", reporter).request
    folder = cache_folder() / "calibration" / f"{source.name}-{request[:16]}"
    if not existing_set(folder, request):
        reporter.say(f"no --calib given: making a calibration set in {folder}")
        overwrite = folder.is_dir()  # it is damaged
        calibrate_pipeline(source, config, output=folder, overwrite=overwrite, device=device, reporter=reporter)
    return folder


def cache_folder() -> Path:
    """`$DACC_CACHE`, else `$XDG_CACHE_HOME/dacc`, else `~/.cache/dacc`."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dacc"
