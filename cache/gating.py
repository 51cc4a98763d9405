"""The threshold of a gate, by runs: what a gated plan costs is counted, it cannot be predicted.

Letters: C calls of a run, K calls that compute.
"""

from __future__ import annotations

from collections.abc import Collection
from types import ModuleType
from typing import Any

from ..core.cache_plan import BlockRange, CachePlan, Unit
from ..core.errors import UnsupportedError
from ..core.reporter import Reporter
from ..runtime.installed import no_cache
from ..runtime.request import RunRequest
from .planned import planned
from .profile import counted_macs
from .window import Window


def gated_plan(
    pipe: Any,
    component: str,
    blank: CachePlan,
    places: Collection[int],
    computed: int,
    method: ModuleType,
    settings: Any,
    window: Window,
    request: RunRequest,
    reporter: Reporter,
) -> tuple[CachePlan, dict[str, int | float | str]]:
    """The plan whose gate lets K calls compute on the mean of the profiled runs, and what was found on the way.

    Args:
        blank: a plan of one unit, for everything but its codes.
        places: the calls that compute whatever the gate says.
        computed: K.

    Raises:
        UnsupportedError: the unit has no block before it to look at, or the gate may not skip enough.
    """
    check_gated(blank.units[0])
    saved = blank.macs.units[blank.units[0].id] / blank.macs.full  # by a call that skips
    step = saved / blank.calls  # what one more computed call costs
    allowed = 1 - saved + computed * step
    with no_cache(pipe):
        full = counted_macs(pipe, component, request)

    def cost(threshold: float) -> float:
        gates = {blank.units[0].id: method.gate(settings, threshold)}
        window.install_(pipe, component, planned(blank, places, method, settings, gates))
        found = counted_macs(pipe, component, request) / full
        reporter.detail(f"threshold {threshold:.4g}: {found:.4f} of the MACs, {allowed:.4f} are allowed")
        return found

    with reporter.stage("choosing the threshold of the gate"):
        threshold, tried = method.fit_threshold(cost, allowed + 1e-9, step)
    plan = planned(blank, places, method, settings, {blank.units[0].id: method.gate(settings, threshold)})
    return plan, {"threshold": threshold, "tried": tried}


def check_gated(unit: Unit) -> None:
    """Refuse a unit that no gate can stand before.

    Raises:
        UnsupportedError: it is no range of blocks, or begins with the first.
    """
    if not isinstance(unit, BlockRange) or unit.first < 1:
        raise UnsupportedError(
            "a gate looks at the block before a range of blocks of a transformer; this unit has none.",
            mend="Choose --unit blocks:1-N of a transformer, or another method.",
        )
