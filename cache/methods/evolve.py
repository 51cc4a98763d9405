"""Evolutionary search after Evolutionary Caching to Accelerate Your Off-the-Shelf Diffusion Model (ECAD, 2025), arXiv
2506.15682: which unit is computed at which call is a table of bits, and NSGA-II (pymoo's) looks for tables that are not
beaten in both the error of the final sample and the multiply-accumulates.

Beside the paper's crossover at four points and its flips of single bits a child may have a whole span of calls of one
unit flipped; the first call computes everything in every table; what lies inside a skipped unit counts as skipped, so
that equal plans are equal tables. Nothing here runs a network: the driver evaluates.
Letters: P tables, C calls of a run, U units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import NDArray
from pydantic import Field

from ...core.config import Config

Tables = NDArray[numpy.bool_]  # (P, C, U), True computes
Objectives = NDArray[numpy.float64]  # (P, 2): error and cost, less is better

CROSSOVER_POINTS = 4
LONGEST_SPAN = 4  # a flipped span has up to a fourth of the calls


class EvolveConfig(Config):
    """Fields of `--set`."""

    generations: int = Field(20, ge=1)  # more: better plans, longer
    population: int = Field(24, ge=4)  # plans of a generation. More: a denser front, longer
    crossover: float = Field(0.9, ge=0, le=1)  # share of children that mix two parents
    mutation: float = Field(0.7, ge=0, le=1)  # share of children that have bits or a span flipped


CONFIG = EvolveConfig
NEEDS = ("runs",)
UNITS = "many"


def first_population(seeds: Tables, size: int, containers: Sequence[Sequence[int]], seed: int) -> Tables:
    """`size` different tables: the seeds, then mutations of them.

    Args:
        seeds: (S, C, U), at least one.
        containers: for each unit the units that it lies in.
    """
    draw = numpy.random.default_rng(seed)
    found = list(_distinct(settled(seeds, containers)))[:size]
    kept = len(found)
    for attempt in range(100 * size):
        if len(found) == size:
            break
        child = settled(_flipped(found[attempt % kept], draw)[None], containers)[0]
        if not any(numpy.array_equal(child, other) for other in found):
            found.append(child)
    return numpy.stack(found)


def children(
    tables: Tables,
    objectives: Objectives,
    containers: Sequence[Sequence[int]],
    config: EvolveConfig,
    seed: int,
) -> Tables:
    """New tables bred from a population, none of them in it: (up to P, C, U). Equal arguments give equal children."""
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.duplicate import ElementwiseDuplicateElimination
    from pymoo.core.mutation import Mutation
    from pymoo.core.population import Population
    from pymoo.core.problem import Problem
    from pymoo.core.repair import Repair
    from pymoo.operators.crossover.pntx import PointCrossover

    shape = tables.shape[1:]

    class Flip(Mutation):  # type: ignore[misc]
        def _do(self, problem: Any, X: Any, *args: Any, random_state: Any = None, **kwargs: Any) -> Any:
            return numpy.stack([_flipped(row.reshape(shape), random_state).reshape(-1) for row in X])

    class Settle(Repair):  # type: ignore[misc]
        def _do(self, problem: Any, X: Any, **kwargs: Any) -> Any:
            return settled(X.reshape(-1, *shape), containers).reshape(len(X), -1)

    class Equal(ElementwiseDuplicateElimination):  # type: ignore[misc]
        def is_equal(self, a: Any, b: Any) -> bool:
            return numpy.array_equal(a.X, b.X)

    size = int(numpy.prod(shape))
    algorithm = NSGA2(
        pop_size=len(tables),
        sampling=Population.new(X=tables.reshape(len(tables), -1), F=objectives),
        crossover=PointCrossover(min(CROSSOVER_POINTS, size - 1), prob=config.crossover),
        mutation=Flip(prob=config.mutation),
        repair=Settle(),
        eliminate_duplicates=Equal(),
    )
    problem = Problem(n_var=size, n_obj=2, xl=0, xu=1, vtype=bool)
    algorithm.setup(problem, seed=seed, termination=("n_gen", 2), verbose=False)
    algorithm.tell(infills=algorithm.ask())
    born = algorithm.ask()
    if born is None or not len(born):
        return tables[:0]
    return born.get("X").astype(bool).reshape(-1, *shape)  # type: ignore[no-any-return]


def survivors(objectives: Objectives, count: int, seed: int) -> list[int]:
    """Places of the `count` tables that live on: the better fronts, and of the last one the least crowded."""
    from pymoo.core.population import Population
    from pymoo.core.problem import Problem
    from pymoo.operators.survival.rank_and_crowding import RankAndCrowding

    places = numpy.arange(len(objectives))[:, None]
    everyone = Population.new(X=places, F=objectives)
    draw = numpy.random.default_rng(seed)
    kept = RankAndCrowding().do(Problem(n_var=1, n_obj=2), everyone, n_survive=count, random_state=draw)
    return [int(place) for place in kept.get("X")[:, 0]]


def non_dominated(objectives: Sequence[Sequence[float]]) -> list[int]:
    """Places of the tables that no other beats in one objective without being worse in the other; of equals the first.

    Ordered by cost.
    """
    found: list[int] = []
    for place in sorted(range(len(objectives)), key=lambda place: (objectives[place][1], objectives[place][0], place)):
        if not found or objectives[place][0] < objectives[found[-1]][0]:
            found.append(place)
    return found


def settled(tables: Tables, containers: Sequence[Sequence[int]]) -> Tables:
    """The tables in their one form: everything computed at the first call, units inside skipped ones skipped."""
    found = tables.astype(bool).copy()
    found[:, 0] = True
    for unit, outer in enumerate(containers):
        for place in outer:
            found[:, :, unit] &= found[:, :, place]
    return found


def _flipped(table: Tables, draw: numpy.random.Generator) -> Tables:
    """A table (C, U) with a span of one unit turned to what it was not at its begin, or single bits flipped."""
    found, (calls, units) = table.copy(), table.shape
    if calls > 1 and draw.random() < 0.5:
        unit, first = int(draw.integers(units)), int(draw.integers(1, calls))
        length = int(draw.integers(1, max(2, calls // LONGEST_SPAN + 1)))
        found[first : first + length, unit] = not found[first, unit]
        return found
    flips = draw.random(found.shape) < 1 / found.size
    flips.flat[int(draw.integers(found.size))] = True
    result: Tables = found ^ flips
    return result


def _distinct(tables: Tables) -> Tables:
    kept = {table.tobytes(): place for place, table in reversed(list(enumerate(tables)))}
    return tables[sorted(kept.values())]
