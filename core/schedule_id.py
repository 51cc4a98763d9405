"""What a sampling grid is: scheduler class, its config, and the noise levels that a run visits. Everything that is
fitted to a grid (plans, per-step tables, corrections) carries this value. Nothing here imports torch.

Letters: C calls, the entries of `scheduler.timesteps` (two per step for second-order solvers, save the last).
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from .config import Config

StepRule = Literal["exact", "nearest"]  # what a table does on another grid: refuse, or take the nearest noise level
DIGITS = 6  # significant digits in a hash; a value beside a border of rounding may still differ between machines
# Relative and absolute: grids are float32, and one bit of `alphas_cumprod`, 6e-8, moves a low sigma by 3e-8 / sigma.
NEAR, TINY = 2e-5, 1e-5


class ScheduleId(Config):
    """Identity of a grid. Its `sha256` is a name for people; whether two grids are one says `same_levels`."""

    scheduler: str  # class name
    config_sha256: str
    timesteps: tuple[float, ...]  # (C,), as the scheduler gives them
    sigmas: tuple[float, ...] | None = None  # (C,), noise level over signal level; flow schedulers: their sigma

    @cached_property
    def sha256(self) -> str:
        """Hash of class, config and grid."""
        return _sha256(
            self.model_dump(mode="json") | {"timesteps": _texts(self.timesteps), "sigmas": _texts(self.sigmas)}
        )

    @property
    def short(self) -> str:
        """First 12 digits, for messages and file names."""
        return self.sha256[:12]


@dataclass(frozen=True)
class NoiseGrid:
    """The noise levels of a grid, whoever made it."""

    timesteps: tuple[float, ...]  # (C,)
    sigmas: tuple[float, ...] | None = None  # (C,)


def schedule_id(scheduler: Any) -> ScheduleId:
    """Identity of the grid that `scheduler` holds now, that is after `set_timesteps`."""
    timesteps, sigmas = read_grid(scheduler)
    config = {name: value for name, value in dict(scheduler.config).items() if not name.startswith("_")}
    return ScheduleId(
        scheduler=type(scheduler).__name__,
        config_sha256=_sha256(json.loads(json.dumps(config, default=_plain))),
        timesteps=timesteps,
        sigmas=sigmas,
    )


def read_grid(scheduler: Any) -> tuple[tuple[float, ...], tuple[float, ...] | None]:
    """Timesteps (C,) and sigmas (C,) of a scheduler.

    Schedulers without a list of sigmas get theirs from `alphas_cumprod`; None when there is neither.
    """
    timesteps = tuple(float(value) for value in scheduler.timesteps.tolist())
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) >= len(timesteps):
        return timesteps, tuple(float(value) for value in sigmas.tolist()[: len(timesteps)])
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None or any(not 0 <= value < len(alphas) for value in timesteps):
        return timesteps, None
    signal = alphas.tolist()
    kept = (max(signal[int(value)], 1e-12) for value in timesteps)  # zero-terminal-SNR grids reach 0
    return timesteps, tuple(math.sqrt((1 - alpha) / alpha) for alpha in kept)


def same_levels(first: ScheduleId | NoiseGrid, second: ScheduleId | NoiseGrid) -> bool:
    """Whether two grids visit the same noise levels; schedulers of several classes may. The last bits of a level, which
    differ between machines, do not count."""
    if not _near(first.timesteps, second.timesteps):
        return False
    return first.sigmas is None or second.sigmas is None or _near(first.sigmas, second.sigmas)


def nearest_calls(fitted: ScheduleId | NoiseGrid, running: ScheduleId | NoiseGrid) -> list[int]:
    """For every call of `running` (C',) the call of `fitted` (C,) whose noise level is nearest.

    Compared by log sigma, which is log-SNR up to a factor, or by timestep when one grid has no sigmas. Among equals
    (second-order solvers visit a level twice) the first is taken.
    """
    if fitted.sigmas is not None and running.sigmas is not None:
        known, asked = _logs(fitted.sigmas), _logs(running.sigmas)
    else:
        known, asked = list(fitted.timesteps), list(running.timesteps)
    return [min(range(len(known)), key=lambda call: abs(known[call] - level)) for level in asked]


def _near(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
    return len(first) == len(second) and all(
        math.isclose(one, other, rel_tol=NEAR, abs_tol=TINY) for one, other in zip(first, second, strict=True)
    )


def _logs(sigmas: tuple[float, ...]) -> list[float]:
    return [math.log(max(sigma, 1e-12)) for sigma in sigmas]


def _texts(values: tuple[float, ...] | None) -> list[str] | None:
    return None if values is None else [f"{value:.{DIGITS}g}" for value in values]


def _plain(value: Any) -> Any:
    """Arrays and tensors of a scheduler config as lists, the rest as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
