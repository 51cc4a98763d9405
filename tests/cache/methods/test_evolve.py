from __future__ import annotations

import itertools
import random

import numpy
import pytest

from dacc.cache.methods.evolve import (
    EvolveConfig,
    children,
    first_population,
    non_dominated,
    settled,
    survivors,
)

CONTAINERS = [[], [0], []]
CONFIG = EvolveConfig(population=10)


def seeds(calls: int = 8) -> numpy.ndarray:
    tables = numpy.ones((2, calls, 3), dtype=bool)
    tables[1, 1:] = False
    return tables


def toy_objectives(tables: numpy.ndarray) -> numpy.ndarray:
    """Errors that grow with the length of a gap, and unequal costs."""
    weights = numpy.array([3.0, 1.0, 2.0])
    errors = []
    for table in tables:
        age, total = numpy.zeros(3), 0.0
        for row in table:
            age = numpy.where(row, 0, age + 1)
            total += float((age**1.5 * numpy.array([1.0, 0.2, 2.0])).sum())
        errors.append(total)
    return numpy.stack([numpy.array(errors), (tables * weights).sum((1, 2))], 1)


def hypervolume(objectives: numpy.ndarray, corner: tuple[float, float]) -> float:
    """Area between a front and a corner, strip by strip."""
    area, height = 0.0, corner[0]
    for place in non_dominated(objectives.tolist()):
        error, cost = objectives[place]
        if error < height and cost < corner[1]:
            area, height = area + (height - error) * (corner[1] - cost), error
    return area


def test_only_plans_that_none_beats_are_on_the_front():
    draw = random.Random(0)
    points = [(float(draw.randrange(12)), float(draw.randrange(12))) for _ in range(60)]
    found = [points[place] for place in non_dominated(points)]
    wanted = {
        point
        for point in points
        if not any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)
    }
    assert set(found) == wanted
    assert len(found) == len(wanted)
    assert found == sorted(found, key=lambda point: point[1])


def test_every_table_computes_at_the_first_call_and_skips_what_lies_in_skipped_units():
    draw = numpy.random.default_rng(0)
    found = settled(draw.random((20, 6, 3)) < 0.5, CONTAINERS)
    assert found[:, 0].all()
    assert not (found[:, :, 1] & ~found[:, :, 0]).any()


def test_the_first_population_holds_the_seeds_and_no_table_twice():
    found = first_population(seeds(), 10, CONTAINERS, seed=3)
    assert found.shape == (10, 8, 3)
    assert len({table.tobytes() for table in found}) == 10
    assert all(any(numpy.array_equal(seed, table) for table in found) for seed in seeds())
    assert numpy.array_equal(found, first_population(seeds(), 10, CONTAINERS, seed=3))


def test_children_are_new_settled_and_the_same_for_the_same_seed():
    parents = first_population(seeds(), 10, CONTAINERS, seed=0)
    born = children(parents, toy_objectives(parents), CONTAINERS, CONFIG, seed=5)
    assert born.shape == (10, 8, 3)
    everyone = [table.tobytes() for table in (*parents, *born)]
    assert len(set(everyone)) == len(everyone)
    assert numpy.array_equal(born, settled(born, CONTAINERS))
    assert numpy.array_equal(born, children(parents, toy_objectives(parents), CONTAINERS, CONFIG, seed=5))
    assert not numpy.array_equal(born, children(parents, toy_objectives(parents), CONTAINERS, CONFIG, seed=6))


def test_generations_get_nearer_to_the_best_and_never_lose_what_was_found():
    tables = first_population(seeds(), 10, CONTAINERS, seed=0)
    archive, corner, volumes = tables, (100.0, 60.0), []
    for generation in range(12):
        volumes.append(hypervolume(toy_objectives(archive), corner))
        everyone = numpy.concatenate(
            [tables, children(tables, toy_objectives(tables), CONTAINERS, CONFIG, seed=generation)]
        )
        archive = numpy.concatenate([archive, everyone])
        tables = everyone[survivors(toy_objectives(everyone), 10, seed=generation)]
    assert all(second >= first for first, second in itertools.pairwise(volumes))
    assert volumes[-1] > 1.02 * volumes[0]


@pytest.mark.parametrize("count", [3, 7])
def test_the_front_survives(count):
    objectives = numpy.array([[5, 1], [1, 5], [3, 3], [6, 6], [7, 7], [4, 4], [9, 9]], dtype=float)
    kept = survivors(objectives, count, seed=0)
    assert len(kept) == count
    assert {0, 1, 2} <= set(kept)
