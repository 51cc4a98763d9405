"""The units that a calibrated method treats one after the other, in the order in which they run.

A block of the network (a residual block, a transformer block) is one unit with all its layers; a layer outside of
blocks is a unit alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..core.families import Family
from ..runtime.trajectory import DenoiserCall
from .plan import LayerPlan


@dataclass(frozen=True)
class Unit:
    """One module of the network, and the layers in it that have a scheme."""

    name: str
    plans: tuple[LayerPlan, ...]


def find_units(model: nn.Module, plans: list[LayerPlan], family: Family, call: DenoiserCall) -> list[Unit]:
    """Units with at least one layer to quantize, as they run in `call`; those that do not run in it come last."""
    treated = [plan for plan in plans if plan.scheme]
    members: dict[str, list[LayerPlan]] = {}
    for plan in treated:
        members.setdefault(_unit_of(plan.name, model, family), []).append(plan)
    ran = _order_of_running(model, list(members), call)
    names = [*ran, *(name for name in members if name not in ran)]
    return [Unit(name, tuple(members[name])) for name in names]


def _unit_of(layer: str, model: nn.Module, family: Family) -> str:
    """The outermost block around a layer; the layer itself when there is none."""
    parts = layer.split(".")
    for length in range(1, len(parts)):
        name = ".".join(parts[:length])
        kind = type(model.get_submodule(name)).__name__
        if any(fnmatchcase(kind, pattern) for pattern in family.blocks):
            return name
    return layer


def _order_of_running(model: nn.Module, names: list[str], call: DenoiserCall) -> list[str]:
    """The names in the order in which they first run."""
    order: dict[str, None] = {}

    def note(name: str) -> Any:
        return lambda *_: order.setdefault(name)

    hooks = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    try:
        call.replay(model)
    finally:
        for hook in hooks:
            hook.remove()
    return list(order)
