"""A request to a method, made without weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dacc.core.config import build_config
from dacc.prune.config import METHODS
from dacc.prune.request import Request
from dacc.prune.scores import UnitScore
from dacc.prune.unet import Modules
from dacc.prune.units import find_units, sizes_of

from .toys import Toy


def ask(toy: Toy, ratio: float | None = None, scores: Mapping[str, float] | None = None, **fields: Any) -> Request:
    """What a method would be given; scores not named are 1."""
    with torch.device("meta"):
        network = toy.model(**toy.config)
    sizes, units = sizes_of(network), find_units(network, strict=fields.get("strict", False))
    known = {unit.name: UnitScore((scores or {}).get(unit.name, 1.0)) for unit in units}
    return Request(
        class_name=type(network).__name__,
        config=dict(network.config),
        modules=Modules(sizes),
        sizes=sizes,
        units=units,
        ratio=ratio,
        strict=fields.get("strict", False),
        allow_adjacent=fields.get("allow_adjacent", False),
        seed=fields.get("seed", 0),
        costs={unit.name: unit.parameters for unit in units},
        total=sizes[""],
        scores=known,
    )


def select(method: str, request: Request, **settings: Any) -> tuple[str, ...]:
    """What it removes."""
    found = METHODS.load(method)
    removed: tuple[str, ...] = found.select(request, build_config(found.CONFIG, **settings))
    return removed


def share(request: Request, removed: tuple[str, ...]) -> float:
    """Of all parameters."""
    return sum(request.sizes[name] for name in removed) / request.total
