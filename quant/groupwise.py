"""Treat the linears of a unit that read the same tensor together; all other layers one by one, as layerwise.py does."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

from ..core.config import Config
from .block import Block, Treated
from .entering import entering_of
from .layerwise import BASELINE, treat_layers
from .methods import rtn
from .ranges import dynamic_roundings
from .sequential import levels


@torch.no_grad()
def treat_groups(block: Block, method: ModuleType, config: Config) -> dict[str, Treated]:
    """Every layer of a unit by a method of groups."""
    absorbing = block.only([plan for plan in block.plans if _is_grouped(block, plan.name)])
    others = block.only([plan for plan in block.plans if plan not in absorbing.plans])
    with block.rounding.instead(dynamic_roundings(others)):
        found = treat_layers(others, method, config) if others.plans else {}
    found |= _treat_absorbing(absorbing, method, config) if absorbing.plans else {}
    return {name: found[name] for name in block.layers}


def _is_grouped(block: Block, name: str) -> bool:
    """Convolutions read what no other layer reads: they have factors of their own, see channel_factors.py."""
    return block.scheme(name).absorbs_outliers and isinstance(block.layers[name], nn.Linear)


def _treat_absorbing(block: Block, method: ModuleType, config: Config) -> dict[str, Treated]:
    """Layers that may have smoothing and a branch, group by group; to nearest where nothing ever enters them."""
    groups = levels(block)
    entering = entering_of(block, [group[0] for group in groups])
    found: dict[str, Treated] = {}
    for group in groups:
        weights: dict[str, Tensor] = {name: block.layers[name].weight for name in group}  # type: ignore[misc]
        schemes = {name: block.scheme(name) for name in group}
        if group[0] in entering:
            found |= method.quantize_group(weights, schemes, entering[group[0]], config, block.seed)
            continue
        for name, weight in weights.items():
            found[name] = Treated(rtn.quantize(weight, schemes[name].plain, BASELINE), method="rtn")
    return found
