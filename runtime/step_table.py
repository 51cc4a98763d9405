"""Which row of a per-step table holds in this denoiser call. One table serves all layers of a model: the rows of a
layer are its own, the choice among them is not.

Rows 0..C-1 belong to the C calls of the grid that the table was fitted to, row C to all of them together. In eager mode
every layer asks for the row; a compiled one cannot read the run context and takes `index`, which a hook in front of the
denoiser keeps current. So several threads may share a model, but not a compiled one.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from ..core.errors import ConfigError
from ..core.schedule_id import NoiseGrid, ScheduleId, StepRule, nearest_calls, same_levels
from .clock import RunState, current_grid, current_run

_KEPT_RUNS = 16  # of several threads, whose rows need not be found again


class OtherGridWarning(UserWarning):
    """Scales of every step serve a grid that they were not fitted to."""


class StepTable:
    """The rows of one fitted grid."""

    def __init__(self, schedule: ScheduleId, rule: StepRule = "nearest") -> None:
        self.schedule = schedule
        self.rule: StepRule = rule
        self.index = torch.tensor(self.calls)  # () int64, the row for compiled code; replaced only with its device
        self._last: tuple[RunState | None, int] = (None, self.calls)
        self._runs: dict[int, list[int]] = {}  # run id -> row of each of its calls
        self._told: set[str] = set()

    @property
    def calls(self) -> int:
        """C, which is also the number of the row for all calls."""
        return len(self.schedule.timesteps)

    def row(self) -> int:
        """The row of the denoiser call that runs in this thread.

        Raises:
            ConfigError: the run has another grid and the rule is "exact".
        """
        state = current_run()
        if state is None:
            self._tell("no run", "no sampling run is known here: per-step scales take the values that fit all calls")
            return self.calls
        last = self._last  # one read: another thread may replace it
        if last[0] is not state:
            grid = current_grid()
            row = self._row_alone(state) if grid is None else self._rows_of_run(state.run, grid)[state.call]
            self._last = last = (state, row)
        return last[1]

    def refresh(self, device: torch.device) -> None:
        """Let `index` be the row of the call that comes, near a model on `device`."""
        if device.type not in ("meta", self.index.device.type):  # meta: offloaded until it runs
            self.index = self.index.to(device)
        self.index.fill_(self.row())

    def _rows_of_run(self, run: int, grid: NoiseGrid) -> list[int]:
        rows = self._runs.get(run)
        if rows is None:
            while len(self._runs) >= _KEPT_RUNS:
                self._runs.pop(next(iter(self._runs)), None)
            rows = self._runs[run] = self._match(grid, running=len(grid.timesteps))
        return rows

    def _match(self, grid: NoiseGrid, *, running: int) -> list[int]:
        """The row of every call of a grid."""
        if same_levels(self.schedule, grid):
            return list(range(self.calls))
        self._accept_other(running)
        return nearest_calls(self.schedule, grid)

    def _row_alone(self, state: RunState) -> int:
        """The row of a call that is replayed by itself; all that is known of its grid is its length."""
        own = NoiseGrid((state.timestep,), None if state.sigma is None else (state.sigma,))
        if state.calls == self.calls and same_levels(NoiseGrid((self.schedule.timesteps[state.call],)), own):
            return state.call
        return self._match(own, running=state.calls)[0]

    def _accept_other(self, running: int) -> None:
        fitted = f"fitted for {self.calls} {self.schedule.scheduler} calls, running {running}"
        if self.rule == "exact":
            raise ConfigError(
                f"the per-step scales of this model are {fitted} on another grid.",
                "Their rule is exact: they hold on their own grid only.",
                "Run the scheduler and the number of steps of the calibration, or quantize for this grid.",
            )
        self._tell("other grid", f"per-step scales {fitted} on another grid: each call uses the nearest noise level")

    def _tell(self, topic: str, text: str) -> None:
        """Warn once for each topic."""
        if topic not in self._told:
            self._told.add(topic)
            warnings.warn(text, OtherGridWarning, stacklevel=3)

    def before_denoiser(self, denoiser: nn.Module, _: tuple[Any, ...]) -> None:
        """The hook in front of a denoiser."""
        _refresh(self, denoiser)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _refresh(table: StepTable, denoiser: nn.Module) -> None:
    """Not traced either where a denoiser is compiled as a whole: its row must not become a constant."""
    table.refresh(next(denoiser.parameters()).device)


def hook_step_table_(denoiser: nn.Module, table: StepTable) -> None:
    """Keep the index of a table current at every call of a denoiser, in place of an earlier table."""
    unhook_step_tables_(denoiser)
    denoiser.register_forward_pre_hook(table.before_denoiser)


def unhook_step_tables_(denoiser: nn.Module) -> None:
    """Take the tables away from in front of a denoiser."""
    for key, hook in list(denoiser._forward_pre_hooks.items()):
        if isinstance(getattr(hook, "__self__", None), StepTable):
            del denoiser._forward_pre_hooks[key]
