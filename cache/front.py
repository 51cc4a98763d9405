"""The plans that a search found and no other beats, as data and as a picture."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..core.cache_plan import FRONT_FILES

FRONT_FORMAT = 1


@dataclass(frozen=True)
class Candidate:
    """One plan of a front."""

    error: float  # relative L2 of the final sample
    macs_ratio: float  # of a run without plan
    codes: dict[str, str]  # unit -> a letter for each call


def front_files(
    component: str, front: Sequence[Candidate], seen: Sequence[tuple[float, float]], chosen: int
) -> dict[str, bytes]:
    """Name in the bundle -> content.

    Args:
        front: from the cheapest to the dearest.
        seen: error and MAC ratio of other plans that were tried, for the picture.
        chosen: which of the front the bundle carries.
    """
    names = [name.format(component) for name in FRONT_FILES]
    document = {
        "format": FRONT_FORMAT,
        "component": component,
        "chosen": chosen,
        "plans": [{"relative_l2": plan.error, "macs_ratio": plan.macs_ratio, "codes": plan.codes} for plan in front],
    }
    text = json.dumps(document, indent=1, sort_keys=True) + "\n"
    return dict(zip(names, (text.encode(), _picture(component, front, seen, chosen)), strict=True))


def _picture(component: str, front: Sequence[Candidate], seen: Sequence[tuple[float, float]], chosen: int) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), dpi=120, layout="constrained")
    axes: Any = figure.add_subplot()
    axes.scatter([ratio for _, ratio in seen], [error for error, _ in seen], s=9, color="0.75", label="last generation")
    axes.plot([plan.macs_ratio for plan in front], [plan.error for plan in front], "o-", ms=4, lw=1, label="not beaten")
    own = front[chosen]
    axes.plot([own.macs_ratio], [own.error], "s", ms=9, mfc="none", mew=2, color="tab:red", label="in this bundle")
    if any(error > 0 for error in (plan.error for plan in front)):
        axes.set_yscale("symlog", linthresh=min(plan.error for plan in front if plan.error > 0))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("multiply-accumulates of a run, over one without plan")
    axes.set_ylabel("relative L2 of the final sample")
    axes.set_title(f"{component}: plans that no other beats")
    axes.grid(alpha=0.3)
    axes.legend()
    target = io.BytesIO()
    figure.savefig(target, format="png", metadata={"Software": None})
    return target.getvalue()
