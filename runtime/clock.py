"""The run context: where in a sampling run the denoiser is. Cache hooks and per-step scales read `current_run()`;
layers never count calls. The state lives in a context variable: threads do not see each other's runs, even when their
pipelines share a denoiser. What moves it is in clockwork.py.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from ..core.schedule_id import NoiseGrid

Branch = Literal["cond", "uncond", "both"]
Change = Callable[[Tensor, "RunState", Any], Tensor]  # of a sample at a call, by its scheduler


@dataclass(frozen=True)
class RunState:
    """Where a run is: during a denoiser call this call, between two calls the coming one."""

    run: int  # different for every run of this process
    call: int  # 0..calls-1, index into scheduler.timesteps; img2img starts above 0
    calls: int  # denoiser slots of the whole grid; Heun with N steps: 2N - 1, PNDM: N + 1
    step: int  # 0..steps-1, solver step: second-order solvers spend two calls on one
    steps: int
    timestep: float
    sigma: float | None
    evaluation: int = 0  # which denoiser evaluation inside this call; 1 is the second guidance branch
    branch: Branch | None = None  # both: the batch holds both guidance branches; None: no guidance, or not known


@dataclass
class Run:
    """One run of one scheduler; `state` is replaced, never changed."""

    state: RunState
    grid: Tensor  # the scheduler's own timesteps, to notice that they were replaced
    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...] | None
    order: int
    solver: str  # class name of its scheduler
    train_timesteps: float  # of its scheduler, by which pipelines divide what they tell the denoiser
    told: bool = False  # the pipeline told the scheduler where it begins, or where it is
    started: bool = False  # a denoiser was evaluated in this run
    evaluated: bool = False  # a denoiser was evaluated in this call
    doubled: bool = False  # inputs hold both guidance branches
    counted: Any = None  # the denoiser that was counted before its call and has not run yet
    storage: dict[Any, Any] = field(default_factory=dict)  # what others keep for the length of this run
    before_step: Change | None = None  # gives what a step is made from in place of the sample


RUN: contextvars.ContextVar[Run | None] = contextvars.ContextVar("dacc_run", default=None)  # clockwork.py sets it
_FIXED: contextvars.ContextVar[RunState | None] = contextvars.ContextVar("dacc_fixed_run", default=None)


def current_run() -> RunState | None:
    """The state of the run in this thread; None outside runs.

    A run ends at the last step of its grid. One that stops earlier (an exception, `denoising_end`) leaves its state
    behind until the next `set_timesteps` or `reset_clock`.
    """
    run = RUN.get()
    return _FIXED.get() or (run.state if run else None)


def current_grid() -> NoiseGrid | None:
    """The whole grid of the run in this thread, the same for all its calls; None outside runs and in a fixed one."""
    run = RUN.get()
    return NoiseGrid(run.timesteps, run.sigmas) if run and _FIXED.get() is None else None


def run_storage() -> dict[Any, Any] | None:
    """A place for what has to live as long as the run in this thread; None outside runs and in a fixed one."""
    run = RUN.get()
    return run.storage if run and _FIXED.get() is None else None


def change_samples(change: Change) -> None:
    """Let `change` stand before every step of the run in this thread; outside runs nothing happens."""
    if (run := RUN.get()) is not None and _FIXED.get() is None:
        run.before_step = change


def running_order() -> int:
    """Denoiser calls of one solver step of the run in this thread; 1 outside runs."""
    run = RUN.get()
    return run.order if run else 1


def running_solver() -> str | None:
    """Class name of the scheduler of the run in this thread; None outside runs."""
    run = RUN.get()
    return run.solver if run else None


def running_scheduler(pipe: Any) -> Any | None:
    """The scheduler of a pipeline that the run of this thread belongs to."""
    run = RUN.get()
    found = (part for part in pipe.components.values() if run and getattr(part, "_dacc_run", None) is run)
    return next(found, None)


def reset_clock() -> None:
    """Forget the run of this thread."""
    RUN.set(None)


def end_run(pipe: Any) -> None:
    """Forget the run of this thread and all that was kept for it, also where the schedulers of `pipe` hold on to it."""
    if (scheduler := running_scheduler(pipe)) is not None:
        scheduler._dacc_run = None
    reset_clock()


@contextmanager
def fixed_run(state: RunState | None) -> Iterator[None]:
    """Evaluate denoisers by hand as if a run stood at `state`; used to replay captured calls."""
    tokens = _FIXED.set(state), RUN.set(None)
    try:
        yield
    finally:
        _FIXED.reset(tokens[0])
        RUN.reset(tokens[1])
