"""Depth masks that are learned, after TinyFusion (Fang et al., 2025, CVPR), arXiv 2412.01199: units go in groups of M
in a row, and of every group a fixed number, so that a choice is one of few patterns. Which pattern is best is learned
together with low-rank updates of the weights: by how well the network does once it is trained, not by what it loses at
once. See `prune/masks.py`.

How many of each group go follows from the ratio: as evenly over all stacks as whole numbers allow. Units of a U-Net
are few and of very different size: they are one group, whose patterns are the sets that are just large enough.
Neighbours may go.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import floor

from ...core.errors import ConfigError
from ..masks import Group
from ..request import Request
from ..settings import MaskConfig
from ..stacks import UNETS
from ..units import Unit


class TinyFusionConfig(MaskConfig):
    """Fields of `--set`."""


CONFIG = TinyFusionConfig
NEEDS = ("masks",)
NEEDS_RATIO = True


def groups(request: Request, config: TinyFusionConfig) -> list[Group]:
    """The units, M in a row, with all patterns of what may go of them.

    Raises:
        UnsupportedError: the ratio is out of reach.
        ConfigError: a size of groups for a U-Net.
    """
    costs, needed = request.costs, request.needed()
    total = sum(costs[unit.name] for unit in request.units)
    if needed > total:
        raise request.out_of_reach(total, takes_neighbours=True)
    if request.class_name in UNETS:
        if "group" in config.model_fields_set:
            raise ConfigError("--set group is for transformers: units of a U-Net are one group.", mend="Leave it out.")
        return [Group(tuple(request.units), _just_enough([costs[unit.name] for unit in request.units], needed))]
    stacks: dict[str, list[Unit]] = {}
    for unit in request.units:
        stacks.setdefault(unit.stack, []).append(unit)
    going = _going([[costs[unit.name] for unit in units] for units in stacks.values()], needed)
    found: list[Group] = []
    for units, count in zip(stacks.values(), going, strict=True):
        rows = [units[start : start + config.group] for start in range(0, len(units), config.group)]
        found += [
            Group(tuple(row), tuple(combinations(range(len(row)), own)))
            for row, own in zip(rows, _counts(len(units), count, config.group), strict=True)
        ]
    return found


def _just_enough(costs: Sequence[int], needed: int) -> tuple[tuple[int, ...], ...]:
    """The sets that reach `needed` and would not without any one of their units."""
    places = range(len(costs))
    sets = [chosen for count in range(1, len(costs) + 1) for chosen in combinations(places, count)]
    beyond = {chosen: sum(costs[place] for place in chosen) - needed for chosen in sets}
    return tuple(chosen for chosen in sets if 0 <= beyond[chosen] < min(costs[place] for place in chosen))


def _going(stacks: Sequence[Sequence[int]], needed: int) -> list[int]:
    """How many go of each stack, by the costs of its units: its share, rounded down, and then one after the other where
    most of the share is left, until even the smallest units would do."""
    share = needed / sum(map(sum, stacks))
    going = [floor(share * len(costs) + 1e-9) for costs in stacks]
    while sum(sum(sorted(costs)[:count]) for costs, count in zip(stacks, going, strict=True)) < needed:
        behind = {at: share * len(costs) - going[at] for at, costs in enumerate(stacks) if going[at] < len(costs)}
        going[max(behind, key=behind.__getitem__)] += 1
    return going


def _counts(units: int, going: int, size: int) -> list[int]:
    """How many go of each group, so that after every group as many have gone as is their share, rounded down."""
    ends = [min(start + size, units) for start in range(0, units, size)]
    gone = [end * going // units for end in ends]
    return [later - before for before, later in zip([0, *gone], gone, strict=False)]
