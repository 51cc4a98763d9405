"""What moves the clock of clock.py: schedulers and denoisers of a pipeline.

`attach_clock(pipe)` gives the scheduler instance a subclass of its own class whose methods also move the clock, so
copies, pickles, `save_pretrained` and `isinstance` work as before and no other scheduler is touched. **After
`pipe.scheduler = Other.from_config(...)` call `attach_clock(pipe)` again**; one with a cache plan does so itself.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn

from ..core.pipeline import denoisers
from ..core.schedule_id import read_grid
from .clock import RUN, Branch, Run, RunState

_RUN_IDS = itertools.count(1)
_EXACT = 1e-5  # relative; grids are float32, and some pipelines scale and restore their timesteps
_BRANCH: contextvars.ContextVar[str | None] = contextvars.ContextVar("dacc_branch", default=None)
_OBSERVER: contextvars.ContextVar[Callable[[Tensor], None] | None] = contextvars.ContextVar(
    "dacc_observer", default=None
)


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

    Call it again after replacing `pipe.scheduler` or a denoiser, unless the pipeline has a cache plan.
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
        RUN.set(self._dacc_run)
        return result

    return set_timesteps


def _set_begin_index(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def set_begin_index(self: Any, begin_index: int = 0) -> Any:
        result = method(self, begin_index)
        if run := vars(self).get("_dacc_run"):
            run.told = True
            _move(run, begin_index)
        return result

    return set_begin_index


def _scale_model_input(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def scale_model_input(self: Any, sample: Any, timestep: Any = None, *args: Any, **kwargs: Any) -> Any:
        extra = (timestep, *args) if timestep is not None or args else ()
        result = method(self, sample, *extra, **kwargs)
        if run := _active_run(self):
            run.told = True
            _move(run, _locate(self, run, timestep))
        return result

    return scale_model_input


def _step(method: Callable[..., Any]) -> Callable[..., Any]:
    names = list(inspect.signature(method).parameters)[1:]
    place, from_place = (names.index(name) if name in names else len(names) for name in ("timestep", "sample"))

    @functools.wraps(method)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = _active_run(self)
        timestep = kwargs.get("timestep", args[place] if len(args) > place else None)
        call = _locate(self, run, timestep) if run else 0
        if run and run.before_step:
            if "sample" in kwargs:
                kwargs["sample"] = run.before_step(kwargs["sample"], run.state, self)
            elif len(args) > from_place:
                changed = run.before_step(args[from_place], run.state, self)
                args = (*args[:from_place], changed, *args[from_place + 1 :])
        result = method(self, *args, **kwargs)
        if observer := _OBSERVER.get():
            observer(result[0] if isinstance(result, tuple) else result.prev_sample)
        if run and call + 1 < len(run.timesteps):
            _move(run, call + 1)
        elif run:
            self._dacc_run = None
            RUN.set(None)
        return result

    return step


def _before_denoiser(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The hook in front of a denoiser. Compiled graphs leave it out."""
    if torch.compiler.is_compiling() or (run := RUN.get()) is None:
        return
    _count(run, denoiser, args, kwargs)
    run.counted = _inside(denoiser)


def count_evaluation(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Count an evaluation where the hook in front of the denoiser did not: it is left out of what is compiled.

    Args:
        denoiser: not compiled, or what was.
        args: what the denoiser is called with.
        kwargs: the same, by name.
    """
    if (run := RUN.get()) is None:
        return
    if run.counted is not _inside(denoiser):
        _count(run, denoiser, args, kwargs)
    run.counted = None


def _count(run: Run, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Count evaluations inside a call and name the guidance branch."""
    if not run.started:
        run.doubled = _halves_equal(
            next((value for value in (*args, *kwargs.values()) if torch.is_tensor(value)), None)
        )
        if not run.told:
            _begin_where_asked(run, _asked_timestep(denoiser, args, kwargs))
    evaluation = run.state.evaluation + 1 if run.evaluated else 0
    run.started = run.evaluated = True
    run.state = replace(run.state, evaluation=evaluation, branch=_branch(run))


def _inside(denoiser: nn.Module) -> nn.Module:
    """What `torch.compile(denoiser)` wraps."""
    inner: nn.Module = getattr(denoiser, "_orig_mod", denoiser)
    return inner


def _asked_timestep(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, float] | None:
    """The timestep that a denoiser is called with, and its relative precision; None where tokens or rows differ."""
    value = kwargs.get("timestep")
    if value is None:
        names = list(inspect.signature(type(_inside(denoiser)).forward).parameters)[1:]
        place = names.index("timestep") if "timestep" in names else len(args)
        value = args[place] if place < len(args) else None
    if not torch.is_tensor(value):
        return (float(value), _EXACT) if isinstance(value, int | float) else None
    values = value.flatten()
    if not len(values) or not torch.equal(values, values[:1].expand_as(values)):
        return None
    return float(values[0]), max(_EXACT, torch.finfo(value.dtype).eps if value.is_floating_point() else 0)


def _begin_where_asked(run: Run, asked: tuple[float, float] | None) -> None:
    """Move a run to the later place of its grid that its denoiser is asked for, if there is but one: pipelines that
    begin in the middle do not all tell their scheduler.

    Denoisers take timesteps as they are or from 0 to 1. Some count them backwards or take sigmas, which could be other
    timesteps of the grid (0 for the first of 1000): what may mean the place where the run is does not move it.
    """
    if asked is None:
        return
    value, precision = asked
    now, sigma, top = run.state.timestep, run.state.sigma, run.train_timesteps
    here = [now, now / top, 1 - now / top]
    here += [] if sigma is None else [sigma, sigma / (1 + sigma)]
    if any(math.isclose(value, way, rel_tol=precision, abs_tol=_EXACT) for way in here):
        return
    places = [
        call
        for call in range(run.state.call + 1, len(run.timesteps))
        if any(math.isclose(value, run.timesteps[call] / divisor, rel_tol=precision) for divisor in (1, top))
    ]
    if len(places) == 1:
        _move(run, places[0])


def _halves_equal(inputs: Tensor | None) -> bool:
    """Whether the batch is one batch twice, as pipelines make it that evaluate both guidance branches at once."""
    if inputs is None or inputs.ndim < 2 or len(inputs) % 2:
        return False
    first, second = inputs.chunk(2)
    return torch.equal(first, second)


def _branch(run: Run) -> Branch | None:
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


def _new_run(scheduler: Any) -> Run | None:
    """A run at its first call; None for schedulers without a grid."""
    if getattr(scheduler, "timesteps", None) is None or not len(scheduler.timesteps):
        return None
    timesteps, sigmas = read_grid(scheduler)
    calls, steps = len(timesteps), getattr(scheduler, "num_inference_steps", None) or len(timesteps)
    order = getattr(scheduler, "order", 1)
    if calls != order * (steps - 1) + 1:  # not a solver that lists each of its stages but the last
        order = 1
    state = RunState(next(_RUN_IDS), 0, calls, 0, -(-calls // order), timesteps[0], sigmas[0] if sigmas else None)
    top = float(getattr(scheduler, "config", {}).get("num_train_timesteps") or 1)  # 1: nothing is scaled
    return Run(state, scheduler.timesteps, timesteps, sigmas, order, type(scheduler).__name__, top)


def _active_run(scheduler: Any) -> Run | None:
    """The scheduler's run, made the current one of this thread; begun anew when its grid was replaced by hand."""
    run: Run | None = vars(scheduler).get("_dacc_run")
    if run is None:
        return None
    if scheduler.timesteps is not run.grid:
        if read_grid(scheduler)[0] == run.timesteps:
            run.grid = scheduler.timesteps  # moved to another device
        else:
            run = scheduler._dacc_run = _new_run(scheduler)
    RUN.set(run)
    return run


def _locate(scheduler: Any, run: Run, timestep: Any) -> int:
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


def _move(run: Run, call: int) -> None:
    if call == run.state.call or not 0 <= call < len(run.timesteps):  # a pipeline may begin behind the end: strength 0
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
