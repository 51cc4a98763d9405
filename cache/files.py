"""Files that a request names: a calibration set, call times of an earlier result, a schedule. Imports no torch by
itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..core.calibration import CalibrationRecord
from ..core.config import build_config
from ..core.errors import ConfigError
from ..core.reporter import Reporter
from ..core.safe_read import file_sha256, read_json
from .config import GIVEN, SearchCacheConfig
from .ecad import read_schedule
from .methods.ecad import EcadConfig


def like_calibration(config: SearchCacheConfig, record: CalibrationRecord, reporter: Reporter) -> SearchCacheConfig:
    """The request with what it leaves open as the runs of a calibration set had it; the noise is other noise."""
    if record.recipe.get("images"):
        reporter.notice("the runs of the calibration set began with pictures: those of the search begin with noise")
    runs = record.runs()
    runs["negative_prompt"] = runs.pop("negative_prompts")
    if config.method == GIVEN:
        del runs["steps"]  # its schedule has a number of its own
    taken = {name: value for name, value in runs.items() if value is not None and getattr(config, name) is None}
    return build_config(SearchCacheConfig, **{**config.model_dump(), **taken})


def given_schedule(config: SearchCacheConfig) -> tuple[int, str]:
    """Steps of the schedule file that a request names, and the hash of its content."""
    file = build_config(EcadConfig, **config.settings).file
    return read_schedule(file).steps, file_sha256(file)


def told_config(config: SearchCacheConfig) -> dict[str, Any]:
    """The request as the manifest holds it: a file by its name, which is the same wherever it lies."""
    told = config.model_dump(mode="json")
    if config.method == GIVEN:
        told["settings"]["file"] = Path(told["settings"]["file"]).name
    return told


def read_costs(file: Path) -> dict[str, Any]:
    """Component -> call times of an earlier result.

    Raises:
        ConfigError: the file is missing or holds none.
    """
    if not file.is_file():
        raise ConfigError(f"--cost-profile {file} is no file.", mend="Give the dacc_run.json of an earlier result.")
    raw = read_json(file)
    costs = raw.get("cost_profile") if isinstance(raw, dict) else None
    if not isinstance(costs, dict) or not costs:
        raise ConfigError(f"{file} holds no cost profile.", mend="Give the dacc_run.json of a --speedup result.")
    return costs


def parse_costs(costs: dict[str, Any], component: str) -> tuple[Any, ...]:
    """Call times of a component from a profile, one for each unit; none when it has none.

    Raises:
        ConfigError: they cannot be read.
    """
    from .profile import CallCost

    try:
        return tuple(CallCost(**cost) for cost in costs.get(component, ()))
    except (ValidationError, TypeError):
        raise ConfigError(
            f"the cost profile of {component} cannot be read.", mend="Measure anew: leave --cost-profile out."
        ) from None
