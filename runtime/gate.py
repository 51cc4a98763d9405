"""Gates: whether a range of blocks runs or is skipped is decided in the call itself, by what the block before it gave.

residual    mean |r - r'| / mean |r'|, r what that block adds to what enters it and r' the same at the last call that
            computed the range, as first-block caching does
forecast    mean |h - p| / mean |h|, h what that block gives and p its forecast from the last such calls: CG-Taylor

The range is skipped where this is below a threshold. The first guidance branch of a call decides for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers.hooks._helpers import TransformerBlockMetadata
from diffusers.hooks.hooks import ModelHook
from torch import Tensor, nn

from ..core.cache_plan import COMPUTE, FORECAST, GATE, REUSE, SKIPPING, BlockRange, CachePlan, Gate, Predictor
from .block_streams import entering, leaving
from .cache_hooks import FRAME, original_of
from .cache_units import Layout, block_names


@dataclass
class GateState:
    """What the gate of a run has decided so far."""

    call: int = -1  # the last one that was decided
    action: str = COMPUTE  # for it
    computed: int = 0  # the last call that computed

    def note(self, call: int, action: str) -> None:
        """The first branch of a call has done so."""
        self.call, self.action = call, action
        if action not in SKIPPING:
            self.computed = call

    def decide(self, plan: CachePlan, call: int, unit: str, change: float | None) -> str:
        """C, or the code by which the plan skips the unit; C where there is nothing yet to compare with."""
        gate = plan.gates[unit]
        tired = gate.max_consecutive is not None and call - self.computed > gate.max_consecutive
        if change is None or tired or not change < gate.threshold:
            return COMPUTE
        return FORECAST if unit in plan.predict else REUSE


class GateHook(ModelHook):
    """Stands before the block in front of a gated range.

    Args:
        owner: the runner whose frames count.
        unit: id of the range.
        path: name of the block.
    """

    def __init__(self, owner: object, unit: str, gate: Gate, path: str, metadata: TransformerBlockMetadata) -> None:
        super().__init__()
        self.owner, self.unit, self.gate, self.path, self.metadata = owner, unit, gate, path, metadata

    def new_forward(self, _: nn.Module, *args: Any, **kwargs: Any) -> Any:
        frame = FRAME.get()
        if frame is None or frame.owner is not self.owner or frame.decide is None:
            return original_of(self)(*args, **kwargs)
        before = entering(self.metadata, args, kwargs)[0]
        output = original_of(self)(*args, **kwargs)
        seen = leaving(self.metadata, output)[0].detach()
        if self.gate.signal == "residual":
            seen = seen - before.detach()
        if frame.actions[self.unit] == GATE:
            known = frame.known(self.unit, self.path)
            whole = seen if self.gate.signal == "forecast" else known
            change = None if known is None else relative_change(seen, known, whole)
            frame.actions[self.unit] = frame.decide(self.unit, change)
        if frame.actions[self.unit] == COMPUTE and self.unit in frame.storing:
            frame.keep(self.unit, self.path, seen)
        return output


def probe_of(layout: Layout, denoiser: nn.Module) -> str:
    """The block before a gated range."""
    assert isinstance(layout.unit, BlockRange)
    return block_names(denoiser, layout.unit.stacks)[layout.unit.first - 1]


def predictors_of(
    plan: CachePlan, layouts: Mapping[str, Layout], denoiser: nn.Module
) -> dict[tuple[str, str], Predictor]:
    """Unit and module -> how what it gives is forecast, what gates look at included."""
    found = {(unit, path): own for unit, own in plan.predict.items() for path in layouts[unit].kept}
    for unit, gate in plan.gates.items():
        if gate.signal == "forecast":
            found[unit, probe_of(layouts[unit], denoiser)] = Predictor(order=gate.order)
    return found


def relative_change(seen: Tensor, known: Tensor, whole: Tensor) -> float:
    """mean |seen - known| / mean |whole|."""
    return float((seen - known).float().abs().mean() / whole.float().abs().mean())
