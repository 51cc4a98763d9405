"""Run a denoiser with a cache plan, by diffusers' own hooks: nothing of the model's code is changed.

A hook on the denoiser opens a frame for each evaluation: which units are computed and which reused, by the call that
the run clock counts. What is kept belongs to the run (`clock.run_storage`), to each guidance branch its own, and is
freed when no later call needs it, when the run ends, and when it fails. A value that is not there, at the first call
of a run that begins in the middle or after a change of shape, makes that evaluation compute everything.
"""

from __future__ import annotations

import contextvars
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from ..core.cache_plan import COMPUTE, GATE, REUSE, SKIPPING, CachePlan, Unit
from ..core.schedule_id import NoiseGrid, same_levels
from .cache_hooks import ADDITIONS, FRAME, Frame, Values, computing, drop, has_free_u, original_of
from .cache_units import Layout, containers_of, layout_of
from .clock import change_samples, current_grid, current_run, run_storage, running_order, running_solver
from .clockwork import count_evaluation
from .compiled import CompiledModules
from .correction import Correction
from .decode_ahead import DecodeAhead, has_step_scales
from .forecast import History
from .gate import GateState, predictors_of
from .hooking import HOOK, hook_units_
from .plan import Row, codes_on, computed_before, macs_ratio, plan_rows
from .prior_noise import PriorNoise

OFF: contextvars.ContextVar[frozenset[int]] = contextvars.ContextVar("dacc_no_cache", default=frozenset())
_FORCED: contextvars.ContextVar[Frame | None] = contextvars.ContextVar("dacc_forced_frame", default=None)


class CachePlanWarning(UserWarning):
    """A cache plan serves a grid that it was not searched on, or does not serve it."""


@dataclass
class _Branch:
    """What one guidance branch of a run keeps."""

    signature: tuple[Any, ...]  # shape, type and device of its inputs
    history: History
    values: Values = field(default_factory=dict)
    strays: set[str] = field(default_factory=set)  # units whose values come from a call that the plan let reuse
    ahead: DecodeAhead | None = None  # decodes several calls at once, for plans that do


class CachedUnits:
    """The units of one denoiser with their hooks; `plan` says what the calls of a run do with them.

    Args:
        denoiser: a UNet or transformer.
        units: what can be skipped.
        plan: None: units are skipped only by `reusing`.
        correction: the tables of a plan that corrects what is reused.

    Raises:
        ModelError: the denoiser has no such module.
        UnsupportedError: the denoiser is not built as a unit needs it.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        units: Iterable[Unit],
        plan: CachePlan | None = None,
        correction: Correction | None = None,
    ) -> None:
        self.denoiser, self.plan, self.correction = denoiser, plan, correction
        self.layouts: dict[str, Layout] = {unit.id: layout_of(denoiser, unit) for unit in units}
        self.containers = containers_of(self.layouts.values())
        self._told: set[str] = set()
        self._gated = next(iter(plan.gates), None) if plan else None
        self._predictors = predictors_of(plan, self.layouts, denoiser) if plan else {}
        hook_units_(self, denoiser, self.layouts, self.containers, plan)
        self.compiled = CompiledModules(module for module in denoiser.modules() if self._hooks_of(module))
        _registry(denoiser).register_hook(RootHook(self), HOOK)

    @property
    def names(self) -> tuple[str, ...]:
        """Ids of the units."""
        return tuple(self.layouts)

    def remove_(self) -> None:
        """Take the hooks away; the denoiser runs as it did."""
        self.compiled.give_back_()
        for module in self.denoiser.modules():
            for name in reversed(self._hooks_of(module)):  # the outermost first: what lies around one keeps calling it
                _registry(module).remove_hook(name, recurse=False)

    def _hooks_of(self, module: nn.Module) -> list[str]:
        """Names of our hooks of a module, the innermost first."""
        registry: Any = getattr(module, "_diffusers_hook", None)
        hooks = registry.hooks.items() if registry else ()
        return [name for name, hook in hooks if name.startswith(HOOK) and getattr(hook, "owner", None) is self]

    @contextmanager
    def recording(self, values: Values) -> Iterator[None]:
        """Evaluate by hand: everything is computed, and the value of every unit goes to `values`."""
        with self._forced(Frame(self, computing(self.names), frozenset(self.names), values)):
            yield

    @contextmanager
    def reusing(self, values: Values, units: Iterable[str]) -> Iterator[None]:
        """Evaluate by hand: `units`, of which none lies in another, take their values from `values`."""
        skipped = set(units)
        actions = {
            name: REUSE if name in skipped else "-" if self.containers[name] & skipped else COMPUTE
            for name in self.names
        }
        with self._forced(Frame(self, actions, frozenset(), values)):
            yield

    def open(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Frame, Row | None] | None:
        """The frame of an evaluation that begins; None where nothing is cached."""
        if (forced := _FORCED.get()) is not None and forced.owner is self:
            return forced, None
        storage, state, grid = run_storage(), current_run(), current_grid()
        if self.plan is None or id(self) in OFF.get():
            return None
        if state is None:
            self._tell(
                f"{type(self.denoiser).__name__} has a cache plan, but is evaluated outside of a run of the scheduler "
                "that its pipeline had when the plan was installed: everything is computed"
            )
        if storage is None or state is None or grid is None:
            return None
        if (self, "rows") not in storage:
            storage[self, "rows"] = self._rows(self.plan, grid)
        rows: list[Row] | None = storage[self, "rows"]
        if rows is None:
            return None
        if self.plan.prior_noise and (self, "noise") not in storage:
            storage[self, "noise"] = True
            change_samples(PriorNoise(self.plan.prior_noise))
        row, signature = rows[state.call], _signature(args, kwargs)
        key = (self, state.branch, state.evaluation)
        branch: _Branch | None = storage.get(key)
        if branch is None or branch.signature != signature:
            branch = storage[key] = _Branch(signature, History(self._predictors))
        gate: GateState = storage.setdefault((self, "gate"), GateState())
        followed = state.evaluation > 0 and gate.call == state.call  # the first branch has decided
        actions = {unit: gate.action if followed and own == GATE else own for unit, own in row.actions.items()}
        skipped = {unit for unit, action in actions.items() if action in SKIPPING}
        if skipped - {unit for unit, _ in branch.values}:
            actions = computing(self.names)
        storing = frozenset(unit for unit in row.needed if actions[unit] in (COMPUTE, GATE))
        branch.strays -= storing
        branch.strays |= {unit for unit in storing if row.actions[unit] != COMPUTE}
        frame = Frame(self, actions, storing, branch.values, branch.history, state)
        frame.correct = self._correcting(grid, state.call, branch)
        frame.fitted = self._fitting(grid, state.call, branch)
        frame.decide = partial(gate.decide, self.plan, state.call) if self.plan.gates else None
        if self.plan.decode_ahead > 1 and not SKIPPING.isdisjoint(actions.values()):
            frame.ahead = self._decoding(rows, grid, state.call, branch)
        return frame, row

    def close(self, frame: Frame, row: Row | None) -> None:
        """Free what no later call needs, and tell the gate what was done."""
        if row is not None:
            storage = run_storage()
            if self._gated and storage is not None and frame.state is not None and frame.state.evaluation == 0:
                storage[self, "gate"].note(frame.state.call, frame.actions[self._gated])
            drop(frame.values, set(self.names) - row.needed.keys())
            frame.history.trim(row.needed)

    def _correcting(self, grid: NoiseGrid, call: int, branch: _Branch) -> Callable[[str, str, Any], Any] | None:
        """How a call corrects what it reuses: where what was fitted holds, and from the call that the plan means."""
        if self.correction is None or self.plan is None or not _as_fitted(self.plan, grid):
            return None
        correction, strays = self.correction, frozenset(branch.strays)

        def correct(unit: str, path: str, value: Any) -> Any:
            return value if unit in strays else correction.apply(unit, path, call, value)

        return correct

    def _fitting(self, grid: NoiseGrid, call: int, branch: _Branch) -> Callable[[str, str], Any] | None:
        """How a call forecasts by fitted weights: where these hold, from the calls that the plan means."""
        correction, plan = self.correction, self.plan
        if correction is None or plan is None or not plan.predict or not _as_fitted(plan, grid):
            return None

        def fitted(unit: str, path: str) -> Any:
            points = branch.history.points((unit, path))
            meant = computed_before(plan, unit, call)[-correction.looks_back(unit, path, call) :]
            if [point.call for point in points[-len(meant) :]] != meant:
                return None
            return correction.forecast(unit, path, call, [point.value for point in points[-len(meant) :]])

        return fitted

    def _decoding(self, rows: list[Row], grid: NoiseGrid, call: int, branch: _Branch) -> Callable[..., Any]:
        """How a call that reuses is evaluated together with those behind it that reuse the same."""
        assert self.plan is not None
        if branch.ahead is None:
            branch.ahead = DecodeAhead(self.denoiser, self._tell)
            if has_step_scales(self.denoiser):
                branch.ahead.give_up("its layers have scales of their own for every call")
        end = call
        while end < min(len(rows), call + self.plan.decode_ahead) and rows[end].actions == rows[call].actions:
            end += 1
        corrections = [self._correcting(grid, later, branch) for later in range(call, end)]
        return partial(branch.ahead, branch.values, call, grid.timesteps[call:end], corrections)

    def _rows(self, plan: CachePlan, grid: NoiseGrid) -> list[Row] | None:
        """What each call of the run that begins does; None when the plan does not serve its grid.

        Raises:
            ConfigError: another grid, and the plan's rule is "exact".
        """
        codes = codes_on(plan, grid, order=running_order(), solver=running_solver())
        calls = len(grid.timesteps)
        searched = f"the cache plan was searched for {plan.calls} {plan.schedule.scheduler} calls"
        if codes is None:
            self._tell(f"{searched}; this run of {calls} calls is too short for it and runs without")
            return None
        depths = dict.fromkeys(self.names, 1)
        for (unit, _), predictor in self._predictors.items():
            depths[unit] = max(depths[unit], predictor.order + 1)
        rows = plan_rows(codes, self.containers, depths)
        dropped = self.correction is not None and not _as_fitted(plan, grid)
        if codes != plan.codes or dropped:
            without = ", without the correction of what it skips" if dropped else ""
            most = "at most " if plan.gates else ""
            run = f"run of {calls} {running_solver()} calls"
            other = run if same_levels(plan.schedule, grid) else f"{run} on another grid"
            self._tell(
                f"{searched}; this {other} follows its noise levels{without}, with {most}"
                f"{macs_ratio(plan, rows):.0%} of the multiply-accumulates of one that computes everything"
            )
        if grid.sigmas is None and any(predictor.x == "sigma" for predictor in plan.predict.values()):
            self._tell("this scheduler has no sigmas; forecasts of the cache plan run over its timesteps")
        return rows

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            warnings.warn(text, CachePlanWarning, stacklevel=2)

    @contextmanager
    def _forced(self, frame: Frame) -> Iterator[None]:
        token = _FORCED.set(frame)
        try:
            yield
        finally:
            _FORCED.reset(token)


class RootHook(ModelHook):
    """Stands before the denoiser: opens and closes the frame of every evaluation."""

    def __init__(self, owner: CachedUnits) -> None:
        super().__init__()
        self.owner = owner

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def new_forward(self, _: nn.Module, *args: Any, **kwargs: Any) -> Any:
        count_evaluation(self.owner.denoiser, args, kwargs)  # where the denoiser is compiled as a whole
        self.owner.compiled.step_outside_()
        opened = self.owner.open(args, kwargs)
        if opened is None:
            return original_of(self)(*args, **kwargs)
        frame, row = opened
        frame.changed = any(kwargs.get(name) is not None for name in ADDITIONS) or has_free_u(self.owner.denoiser)
        forward = original_of(self) if frame.ahead is None else partial(frame.ahead, original_of(self))
        token = FRAME.set(frame)
        try:
            output = forward(*args, **kwargs)
        except BaseException:
            frame.values.clear()
            frame.history.clear()
            raise
        finally:
            FRAME.reset(token)
        self.owner.close(frame, row)
        return output


def _as_fitted(plan: CachePlan, grid: NoiseGrid) -> bool:
    """Whether what was fitted to the plan's runs holds in this one: over equal levels other solvers lead elsewhere."""
    return same_levels(plan.schedule, grid) and running_solver() == plan.schedule.scheduler


def _registry(module: nn.Module) -> HookRegistry:
    return HookRegistry.check_if_exists_or_initialize(module)


def _signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Shape, type and device of what enters a denoiser first: the noisy sample."""
    sample = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    return () if sample is None else (sample.shape, sample.dtype, sample.device)
