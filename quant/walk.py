"""Denoiser calls that stand still in front of a unit, wait until it is treated, and walk on to the next one.

A calibrated method treats units in the order in which they run, each with the inputs that the treated units before it
give. Running the whole network anew for every unit would cost units x calls evaluations. Here every call is evaluated
once: a coroutine holds it, stops it where a unit is about to run, and keeps what the rest of the network needs.
Memory: what lives in one denoiser evaluation, times the calls; or as much of the disk (`quant/paging.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import greenlet
import torch
from torch import nn

from ..runtime.trajectory import DenoiserCall
from .paging import paged


@dataclass(frozen=True)
class UnitInput:
    """What is about to enter a unit in one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Walk:
    """All calls of a calibration set on their way through one denoiser; a context manager.

    Args:
        model: changed in place between the steps, by changing weights and hooks of its modules.
        calls: what enters the denoiser.
        units: module names in the order in which they run; a unit that runs again later in a call is not stopped again.
        folder: where what the calls hold is paged to; None: it stays in memory.
    """

    def __init__(
        self, model: nn.Module, calls: Sequence[DenoiserCall], units: Sequence[str], folder: Path | None = None
    ) -> None:
        self._folder = folder
        self._walkers = [_Walker(model, call) for call in calls]
        self._places = {name: place for place, name in enumerate(units)}
        self._at = -1
        self._hooks = [
            # before all other hooks: they are to run when the call goes on, on the way into the treated unit
            model.get_submodule(name).register_forward_pre_hook(_stop_at(place), with_kwargs=True, prepend=True)
            for name, place in self._places.items()
        ]

    def __enter__(self) -> Walk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        with torch.no_grad():  # as in `_Walker.advance`: what unwinds puts the flag back to what it was on its way in
            for walker in self._walkers:
                walker.throw(greenlet.GreenletExit)  # ends quietly; what it held is freed

    def advance(self, unit: str) -> list[UnitInput | None]:
        """Let every call run on to the entry of `unit`; None for a call in which it does not run.

        Raises:
            ValueError: the unit lies behind, or is not one of those that the walk was made for.
        """
        if self._places.get(unit, -1) <= self._at:
            raise ValueError(f"{unit} is not a unit ahead")
        self._at = self._places[unit]
        return [self._advance(walker) for walker in self._walkers]

    def _advance(self, walker: _Walker) -> UnitInput | None:
        with paged(self._folder):
            return walker.advance(self._at)


class _Walker(greenlet.greenlet):
    """One call; it starts when it is first told to go on."""

    def __init__(self, model: nn.Module, call: DenoiserCall) -> None:
        super().__init__(lambda: call.replay(model))
        self.place = -1  # of the unit that it stands in front of
        self.goal = -1
        self.found: UnitInput | None = None

    def advance(self, goal: int) -> UnitInput | None:
        """Walk on to the unit at `goal`, or to one behind it when that does not run in this call."""
        self.goal = goal
        if self.place < goal and not self.dead:
            self.found = None
            with torch.no_grad():  # the flag belongs to the thread, not to the coroutine
                self.switch()
        return self.found if self.place == goal and not self.dead else None


def _stop_at(place: int) -> Any:
    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        walker = greenlet.getcurrent()
        if isinstance(walker, _Walker) and place >= walker.goal:
            walker.place, walker.found = place, UnitInput(args, kwargs)
            assert walker.parent is not None
            walker.parent.switch()

    return stop
