"""Depth masks that are learned, after TinyFusion (Fang et al., 2025, CVPR), arXiv 2412.01199: units go in groups of M
in a row, and of every group a fixed number, so that a choice is one of few patterns. Which pattern is best is learned
together with low-rank updates of the weights: by how well the network does once it is trained, not by what it loses at
once. See `prune/masks.py`.

How many of each group go follows from the ratio: as evenly over a stack as whole numbers allow. Neighbours may go.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from math import ceil

from ..masks import Group
from ..request import Request
from ..settings import MaskConfig
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
    """
    total = sum(request.costs[unit.name] for unit in request.units)
    share = request.needed() / total
    if share > 1:
        raise replace(request, allow_adjacent=True).out_of_reach(total)  # which they are
    found: list[Group] = []
    for stack in dict.fromkeys(unit.stack for unit in request.units):
        units = [unit for unit in request.units if unit.stack == stack]
        counts = _counts(len(units), ceil(share * len(units) - 1e-9), config.group)
        rows: list[list[Unit]] = [units[start : start + config.group] for start in range(0, len(units), config.group)]
        found += [
            Group(tuple(row), tuple(combinations(range(len(row)), count)))
            for row, count in zip(rows, counts, strict=True)
        ]
    return found


def _counts(units: int, going: int, size: int) -> list[int]:
    """How many go of each group, so that after every group as many have gone as is their share, rounded down."""
    ends = [min(start + size, units) for start in range(0, units, size)]
    gone = [end * going // units for end in ends]
    return [later - before for before, later in zip([0, *gone], gone, strict=False)]
