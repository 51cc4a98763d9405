"""`dacc prune --dry-run`: units, their scores and what would go, as a table and as a picture; nothing is written."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.config import Config, Document
from ..core.errors import UnsupportedError
from ..core.manifest import PrunedUnit
from ..core.reporter import Reporter
from ..core.source import Source
from ..runtime.skeleton import build_skeleton
from .api import prepare
from .config import PruneConfig
from .run import calibration_for, choose, refuse_checkpointing, smaller, whole_of

NAMED_AT_MOST = 40  # characters of a unit's name in the picture


class ComponentPreview(Config):
    """What would happen to one model."""

    class_name: str
    parameters_before: int
    parameters_after: int
    units: dict[str, PrunedUnit]
    config: dict[str, Any]  # fields that would change -> their new values
    identity_modules: tuple[str, ...] = ()
    error: float | None = None
    additivity: float | None = None


class Preview(Document):
    """The plan of a whole request."""

    source: str
    method: str
    components: dict[str, ComponentPreview]


def preview_pruning(
    source: str | Path | Source | None,
    config: PruneConfig,
    *,
    calib: str | Path | None = None,
    device: str = "auto",
    from_reference: bool = False,
    reporter: Reporter,
) -> Preview:
    """Judge and choose as `prune_pipeline` would, and write no pipeline.

    Raises:
        DaccError: as `prune_pipeline` would.
    """
    job = prepare(source, config, reporter, calib, from_reference=from_reference)
    refuse_checkpointing(job)
    calibration = calibration_for(job, device, reporter)
    components = {}
    for name in job.components:
        decision = choose(job, name, whole_of(job, name, calibration, device), {}, reporter)
        skeleton: Any = build_skeleton(job.source.path / name)
        removal = decision.removal
        components[name] = ComponentPreview(
            class_name=type(skeleton).__name__,
            parameters_before=decision.parameters,
            parameters_after=sum(value.numel() for value in smaller(skeleton, removal).parameters()),
            units=decision.units,
            config={key: value for key, value in removal.config.items() if value != skeleton.config.get(key)},
            identity_modules=removal.identity,
            error=decision.error,
            additivity=decision.additivity,
        )
    return Preview(source=job.source.identity, method=job.config.method, components=components)


def picture(units: Mapping[str, PrunedUnit], title: str) -> bytes:
    """A bar for the score of each unit, those that would go in another colour; PNG.

    Raises:
        UnsupportedError: there are no scores, or no matplotlib.
    """
    if not any(unit.score is not None for unit in units.values()):
        raise UnsupportedError("there is nothing to plot: this method does not score units.", mend="Leave --plot out.")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError(
            "--plot needs matplotlib.", mend="pip install 'dacc-diffusion[plot]', or leave --plot out."
        ) from None
    count = len(units)
    figure = Figure(figsize=(7.2, max(2.4, 1.2 + 0.26 * count)), dpi=120, layout="constrained")
    axes: Any = figure.add_subplot()
    colours = {True: "tab:red", False: "tab:blue"}
    for removed, label in ((True, "goes"), (False, "stays")):
        places = [place for place, unit in enumerate(units.values()) if unit.removed is removed]
        scores = [unit.score or 0.0 for unit in units.values() if unit.removed is removed]
        axes.barh(places, scores, color=colours[removed], label=label, height=0.7)
    axes.set_yticks(range(count), [_short(name) for name in units])
    axes.invert_yaxis()
    axes.set_xlabel("score: how much the network would miss the unit")
    axes.set_title(title)
    axes.grid(alpha=0.3, axis="x")
    axes.legend()
    target = io.BytesIO()
    figure.savefig(target, format="png", metadata={"Software": None})
    return target.getvalue()


def _short(name: str) -> str:
    return name if len(name) <= NAMED_AT_MOST else f"{name[: NAMED_AT_MOST - 3]}..."
