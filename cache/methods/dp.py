"""Dynamic programme over groups of calls, after CacheQuant (2025), arXiv 2503.01323: each group computes at its first
call and reuses what that gave until its end. Of all ways to cut a run into K groups the cheapest is found, exactly.

    D(i, j) = sum over t = i ... j - 1 of cost[i, t],    M(n, k) = min over j of M(j, k - 1) + D(j, n)

Whole runs then move calls, of these groups or of equal ones, for as long as they get better (`cache/moving.py`), which
is not in the paper.
cost[i, t] is what it does to reuse at call t what call i computed, profiled on runs that compute everything. On a
quantized network cost[i, i] is the error of a full call and counts too.
Letters: C calls of a run, K groups, which is also the number of calls that compute.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import Field

from ...core.config import Config
from ...core.errors import ConfigError, UnsupportedError
from ..moving import Choice
from . import deepcache

INFINITE = float("inf")


class DPConfig(Config):
    """Fields of `--set`."""

    cost: Literal["output", "feature"] = "output"  # output: error of the denoiser's output times how far it moves
    # the final sample; feature: L1 distance of the reused values, as published, which needs no further evaluations
    joint: bool = True  # on a quantized source: against what the float network computes, rounding errors included
    correct: bool = True  # fit an affine map per call and channel to what is reused
    rank: int = Field(8, ge=0)  # and mix their channels in so many ranks; 0: each by itself, as published
    layers: bool = True  # on a quantized source: and to the outputs of the layers that read it, against the float ones
    trials: int = Field(24, ge=0)  # whole runs in which calls that compute are moved; more: better, longer
    bounds: bool = False  # groups of ceil(N / 2) to 2 N calls only, N = ceil(C / K), as the authors' program


CONFIG = DPConfig
NEEDS = ("cost",)


def schedule(calls: int, computed: int, config: DPConfig, cost: list[list[float]]) -> tuple[int, ...]:
    """The calls that compute, ascending, the first of them 0.

    Args:
        calls: C.
        computed: K, at most C.
        cost: (C, C), cost[i][t] of reusing at call t what call i computed; t = i: of computing.

    Raises:
        ConfigError: with `bounds` the calls cannot be cut into so many groups.
        UnsupportedError: every way to cut them has a cost that is not finite.
    """
    shortest, longest = _bounds(calls, computed) if config.bounds else (1, calls)
    if not computed * shortest <= calls <= computed * longest:
        raise ConfigError(
            f"{calls} calls cannot be cut into {computed} groups of {shortest} to {longest}.",
            mend="Leave --set bounds=true out.",
        )
    segment = segment_costs(cost)
    best = [[INFINITE] * (computed + 1) for _ in range(calls + 1)]
    start = [[0] * (computed + 1) for _ in range(calls + 1)]
    best[0][0] = 0.0
    for end in range(1, calls + 1):
        for first in range(max(0, end - longest), end - shortest + 1):
            for groups in range(1, computed + 1):
                total = best[first][groups - 1] + segment[first][end]
                if total < best[end][groups]:
                    best[end][groups], start[end][groups] = total, first
    if best[calls][computed] == INFINITE:
        raise UnsupportedError(
            "the costs of reuse are not finite.",
            "Numbers of the profiled runs overflow, as may happen in float16.",
            "Search with --device cpu, in float32, or by a method that needs no costs: --method deepcache.",
        )
    found, end = [], calls
    for groups in range(computed, 0, -1):
        end = start[end][groups]
        found.append(end)
    return tuple(reversed(found))


def candidates(calls: int, computed: int, config: DPConfig, cost: list[list[float]]) -> list[Choice]:
    """What whole runs start from: the cheapest groups, and equal ones, since costs are those of single calls.
    Arguments as for `schedule`."""
    even = deepcache.schedule(calls, computed, deepcache.DeepCacheConfig())
    return [Choice(config, places) for places in dict.fromkeys((schedule(calls, computed, config, cost), even))]


def permits(places: tuple[int, ...], calls: int, config: DPConfig) -> bool:
    """Whether whole runs may move calls so: with `bounds` no group gets shorter or longer than these."""
    shortest, longest = _bounds(calls, len(places))
    return not config.bounds or all(shortest <= end - first <= longest for first, end in pairwise((*places, calls)))


def segment_costs(cost: list[list[float]]) -> list[list[float]]:
    """D(i, j) of all groups from call i to call j - 1: (C, C + 1)."""
    calls = len(cost)
    found = [[0.0] * (calls + 1) for _ in range(calls)]
    for first in range(calls):
        for end in range(first + 1, calls + 1):
            found[first][end] = found[first][end - 1] + cost[first][end - 1]
    return found


def schedule_cost(places: tuple[int, ...], cost: list[list[float]]) -> float:
    """What a schedule costs: the sum of D over its groups."""
    segment, ends = segment_costs(cost), (*places[1:], len(cost))
    return sum(segment[first][end] for first, end in zip(places, ends, strict=True))


def _bounds(calls: int, computed: int) -> tuple[int, int]:
    interval = -(-calls // computed)
    return -(-interval // 2), 2 * interval
