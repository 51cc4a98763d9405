"""The run context: where in a sampling run the denoiser is. Cache hooks and per-step scales read `current_run()`;
layers never count calls.

`attach_clock(pipe)` gives the scheduler instance a subclass of its own class whose methods also move the clock, so
copies, pickles, `save_pretrained` and `isinstance` work as before and no other scheduler is touched. **After
`pipe.scheduler = Other.from_config(...)` call `attach_clock(pipe)` again.** The state lives in a context variable:
threads do not see each other's runs, even when their pipelines share a denoiser.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn

from ..core.pipeline import denoisers
from ..core.schedule_id import NoiseGrid, read_grid

Branch = Literal["cond", "uncond", "both"]
_RUN_IDS = itertools.count(1)


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
class _Run:
    """One run of one scheduler; `state` is replaced, never changed."""

    state: RunState
    grid: Tensor  # the scheduler's own timesteps, to notice that they were replaced
    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...] | None
    order: int
    started: bool = False  # a denoiser was evaluated in this run
    evaluated: bool = False  # a denoiser was evaluated in this call
    doubled: bool = False  # inputs hold both guidance branches
    storage: dict[Any, Any] = field(default_factory=dict)  # what others keep for the length of this run


_RUN: contextvars.ContextVar[_Run | None] = contextvars.ContextVar("dacc_run", default=None)
_FIXED: contextvars.ContextVar[RunState | None] = contextvars.ContextVar("dacc_fixed_run", default=None)
_BRANCH: contextvars.ContextVar[str | None] = contextvars.ContextVar("dacc_branch", default=None)
_OBSERVER: contextvars.ContextVar[Callable[[Tensor], None] | None] = contextvars.ContextVar(
    "dacc_observer", default=None
)


def current_run() -> RunState | None:
    """The state of the run in this thread; None outside runs.

    A run ends at the last step of its grid. One that stops earlier (an exception, `denoising_end`) leaves its state
    behind until the next `set_timesteps` or `reset_clock`.
    """
    run = _RUN.get()
    return _FIXED.get() or (run.state if run else None)


def current_grid() -> NoiseGrid | None:
    """The whole grid of the run in this thread, the same for all its calls; None outside runs and in a fixed one."""
    run = _RUN.get()
    return NoiseGrid(run.timesteps, run.sigmas) if run and _FIXED.get() is None else None


def run_storage() -> dict[Any, Any] | None:
    """A place for what has to live as long as the run in this thread; None outside runs and in a fixed one."""
    run = _RUN.get()
    return run.storage if run and _FIXED.get() is None else None


def running_order() -> int:
    """Denoiser calls of one solver step of the run in this thread; 1 outside runs."""
    run = _RUN.get()
    return run.order if run else 1


def running_scheduler(pipe: Any) -> Any | None:
    """The scheduler of a pipeline that the run of this thread belongs to."""
    run = _RUN.get()
    found = (part for part in pipe.components.values() if run and getattr(part, "_dacc_run", None) is run)
    return next(found, None)


def reset_clock() -> None:
    """Forget the run of this thread."""
    _RUN.set(None)


def end_run(pipe: Any) -> None:
    """Forget the run of this thread and all that was kept for it, also where the schedulers of `pipe` hold on to it."""
    if (scheduler := running_scheduler(pipe)) is not None:
        scheduler._dacc_run = None
    reset_clock()


@contextmanager
def fixed_run(state: RunState | None) -> Iterator[None]:
    """Evaluate denoisers by hand as if a run stood at `state`; used to replay captured calls."""
    tokens = _FIXED.set(state), _RUN.set(None)
    try:
        yield
    finally:
        _FIXED.reset(tokens[0])
        _RUN.reset(tokens[1])


@contextmanager
def observe_steps(observer: Callable[[Tensor], None]) -> Iterator[None]:
    """Call `observer(prev_sample)` after every scheduler step of this thread."""
    token = _OBSERVER.set(observer)
    try:
        yield
    finally:
        _OBSERVER.reset(token)


def attach_clock(pipe: Any) -> None:
    """Let the pipeline's schedulers and denoisers move the clock. Repeating it changes nothing.

    Call it again after replacing `pipe.scheduler` or a denoiser.
    """
    for component in pipe.components.values():
        if isinstance(component, SchedulerMixin) and not hasattr(component, "_dacc_clocked"):
            component.__class__ = _clocked(type(component))  # type: ignore[arg-type]  # mypy doubts its hash
    for denoiser in denoisers(pipe).values():
        if _before_denoiser not in denoiser._forward_pre_hooks.values():
            denoiser.register_forward_pre_hook(_before_denoiser, with_kwargs=True, prepend=True)
        if hasattr(type(denoiser), "cache_context") and "cache_context" not in vars(denoiser):
            vars(denoiser)["cache_context"] = functools.partial(_named_branch, denoiser)  # survives copy and pickle


@functools.cache
def _clocked(base: type) -> type:
    """A subclass of a scheduler class, of the same name, whose methods also move the clock."""

    def __reduce__(self: Any) -> tuple[Any, ...]:
        return _bare, (base,), {name: value for name, value in vars(self).items() if name != "_dacc_run"}

    members: dict[str, Any] = {"_dacc_clocked": True, "__module__": base.__module__, "__doc__": base.__doc__}
    wrappers = {"set_timesteps": _set_timesteps, "set_begin_index": _set_begin_index, "step": _step}
    wrappers["scale_model_input"] = _scale_model_input
    for name, wrapper in wrappers.items():
        if hasattr(base, name):
            members[name] = wrapper(getattr(base, name))
    return type(base.__name__, (base,), members | {"__reduce__": __reduce__, "__qualname__": base.__qualname__})


def _bare(base: type) -> Any:
    """An empty clocked scheduler, filled by copy or pickle."""
    return object.__new__(_clocked(base))


def _set_timesteps(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        self._dacc_run = _new_run(self)
        _RUN.set(self._dacc_run)
        return result

    return set_timesteps


def _set_begin_index(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def set_begin_index(self: Any, begin_index: int = 0) -> Any:
        result = method(self, begin_index)
        if run := vars(self).get("_dacc_run"):
            _move(run, begin_index)
        return result

    return set_begin_index


def _scale_model_input(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def scale_model_input(self: Any, sample: Any, timestep: Any = None, *args: Any, **kwargs: Any) -> Any:
        extra = (timestep, *args) if timestep is not None or args else ()
        result = method(self, sample, *extra, **kwargs)
        if run := _active_run(self):
            _move(run, _locate(self, run, timestep))
        return result

    return scale_model_input


def _step(method: Callable[..., Any]) -> Callable[..., Any]:
    names = list(inspect.signature(method).parameters)[1:]
    place = names.index("timestep") if "timestep" in names else len(names)

    @functools.wraps(method)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = _active_run(self)
        timestep = kwargs.get("timestep", args[place] if len(args) > place else None)
        call = _locate(self, run, timestep) if run else 0
        result = method(self, *args, **kwargs)
        if observer := _OBSERVER.get():
            observer(result[0] if isinstance(result, tuple) else result.prev_sample)
        if run and call + 1 < len(run.timesteps):
            _move(run, call + 1)
        elif run:
            self._dacc_run = None
            _RUN.set(None)
        return result

    return step


def _before_denoiser(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Count evaluations inside a call and name the guidance branch. Compiled graphs leave this out."""
    if torch.compiler.is_compiling() or (run := _RUN.get()) is None:
        return
    if not run.started:
        run.doubled = _halves_equal(
            next((value for value in (*args, *kwargs.values()) if torch.is_tensor(value)), None)
        )
    evaluation = run.state.evaluation + 1 if run.evaluated else 0
    run.started = run.evaluated = True
    run.state = replace(run.state, evaluation=evaluation, branch=_branch(run))


def _halves_equal(inputs: Tensor | None) -> bool:
    """Whether the batch is one batch twice, as pipelines make it that evaluate both guidance branches at once."""
    if inputs is None or inputs.ndim < 2 or len(inputs) % 2:
        return False
    first, second = inputs.chunk(2)
    return torch.equal(first, second)


def _branch(run: _Run) -> Branch | None:
    """The pipeline's own name for the evaluation if it gives one."""
    name = _BRANCH.get()
    if name is None:
        return "both" if run.doubled else None
    return "both" if name == "cond_uncond" else "uncond" if name.startswith("uncond") else "cond"


@contextmanager
def _named_branch(denoiser: nn.Module, name: str, **kwargs: Any) -> Iterator[None]:
    """Stands before the denoiser's own `cache_context`, by which pipelines name the guidance branch."""
    token = _BRANCH.set(name)
    try:
        with type(denoiser).cache_context(denoiser, name, **kwargs):  # type: ignore[attr-defined]
            yield
    finally:
        _BRANCH.reset(token)


def _new_run(scheduler: Any) -> _Run | None:
    """A run at its first call; None for schedulers without a grid."""
    if getattr(scheduler, "timesteps", None) is None or not len(scheduler.timesteps):
        return None
    timesteps, sigmas = read_grid(scheduler)
    calls, steps = len(timesteps), getattr(scheduler, "num_inference_steps", None) or len(timesteps)
    order = getattr(scheduler, "order", 1)
    if calls != order * (steps - 1) + 1:  # not a solver that lists each of its stages but the last
        order = 1
    state = RunState(next(_RUN_IDS), 0, calls, 0, -(-calls // order), timesteps[0], sigmas[0] if sigmas else None)
    return _Run(state, scheduler.timesteps, timesteps, sigmas, order)


def _active_run(scheduler: Any) -> _Run | None:
    """The scheduler's run, made the current one of this thread; begun anew when its grid was replaced by hand."""
    run: _Run | None = vars(scheduler).get("_dacc_run")
    if run is None:
        return None
    if scheduler.timesteps is not run.grid:
        if read_grid(scheduler)[0] == run.timesteps:
            run.grid = scheduler.timesteps  # moved to another device
        else:
            run = scheduler._dacc_run = _new_run(scheduler)
    _RUN.set(run)
    return run


def _locate(scheduler: Any, run: _Run, timestep: Any) -> int:
    """Position of a call on the grid: the scheduler's own count, else the next place that holds `timestep`."""
    index = getattr(scheduler, "step_index", None)
    expected = run.state.call
    if isinstance(index, int):
        return min(index, len(run.timesteps) - 1)
    if timestep is None:
        return expected
    value = float(timestep.flatten()[0] if torch.is_tensor(timestep) else timestep)
    places = (*range(expected, len(run.timesteps)), *range(expected))  # some solvers visit a timestep twice
    return next((place for place in places if run.timesteps[place] == value), expected)


def _move(run: _Run, call: int) -> None:
    if call == run.state.call:
        return
    run.evaluated = False
    run.state = replace(
        run.state,
        call=call,
        step=call // run.order,
        timestep=run.timesteps[call],
        sigma=run.sigmas[call] if run.sigmas else None,
        evaluation=0,
        branch="both" if run.doubled else None,
    )
