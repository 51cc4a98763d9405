"""The calls of a run that are a denoiser's own: all of them, but where a pipeline has two denoisers for two ranges of
noise. A search knows the own calls only and counts them from 0; what runs, and what is written, is a plan of all calls.

Letters: C calls of a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from ..core.cache_plan import COMPUTE, CachePlan
from ..core.schedule_id import ScheduleId
from ..core.tensor_file import content_hash
from ..runtime.cached import CachedUnits
from ..runtime.correction import SCALE, Correction
from ..runtime.installed import install_plan_


@dataclass(frozen=True)
class Window:
    """A stretch of calls on the grid of a run."""

    grid: ScheduleId  # of all C calls
    first: int
    calls: int

    @property
    def schedule(self) -> ScheduleId:
        """The grid of the own calls."""
        own = slice(self.first, self.first + self.calls)
        sigmas = self.grid.sigmas and self.grid.sigmas[own]
        return ScheduleId(**{**dict(self.grid), "timesteps": self.grid.timesteps[own], "sigmas": sigmas})

    def whole(self, plan: CachePlan, tables: dict[str, Tensor]) -> tuple[CachePlan, dict[str, Tensor]]:
        """A plan of the own calls as one of all calls, and the tables of its correction. Calls that are not the
        denoiser's stand as computed, so that its first one is."""
        after = len(self.grid.timesteps) - self.first - self.calls
        update: dict[str, Any] = {
            "schedule": self.grid,
            "codes": {unit: COMPUTE * self.first + codes + COMPUTE * after for unit, codes in plan.codes.items()},
        }
        padded = {
            name: pad(table, (0, 0) * (table.ndim - 1) + (self.first, after), value=float(name.endswith(SCALE)))
            for name, table in tables.items()
        }
        if plan.correction:
            update["correction"] = plan.correction.model_copy(update={"sha256": content_hash(padded)})
        return plan.model_copy(update=update), padded

    def install_(
        self, pipe: Any, component: str, plan: CachePlan, tables: dict[str, Tensor] | None = None
    ) -> CachedUnits:
        """Let a denoiser run with a plan of its own calls."""
        plan, tables = self.whole(plan, tables or {})
        return install_plan_(pipe, component, plan, Correction(tables, plan) if tables else None)
