from __future__ import annotations

import itertools
import random

import pytest

from dacc import SearchCacheConfig, search_cache
from dacc.cache import search
from dacc.cache.methods import deepcache
from dacc.cache.methods.dp import DPConfig, candidates, permits, schedule, schedule_cost
from dacc.cache.moving import Choice
from dacc.core.errors import ConfigError, UnsupportedError
from dacc.core.manifest import read_manifest


def random_cost(calls: int, seed: int) -> list[list[float]]:
    draw = random.Random(seed)
    return [
        [draw.random() * (call - first) if call > first else 0.0 for call in range(calls)] for first in range(calls)
    ]


def obvious_cost(places: tuple[int, ...], cost: list[list[float]]) -> float:
    """Call by call: what the last computed call before it gives."""
    return sum(cost[max(place for place in places if place <= call)][call] for call in range(len(cost)))


def all_schedules(calls: int, computed: int, shortest: int, longest: int) -> list[tuple[int, ...]]:
    every = ((0, *rest) for rest in itertools.combinations(range(1, calls), computed - 1))
    return [
        places
        for places in every
        if all(shortest <= end - start <= longest for start, end in zip(places, (*places[1:], calls), strict=True))
    ]


@pytest.mark.parametrize("bounds", [False, True])
@pytest.mark.parametrize("calls", range(1, 11))
def test_no_way_to_cut_a_short_run_is_cheaper(calls, bounds):
    for computed in range(1, calls + 1):
        cost = random_cost(calls, seed=100 * calls + computed)
        interval = -(-calls // computed)
        limits = (-(-interval // 2), 2 * interval) if bounds else (1, calls)
        candidates = all_schedules(calls, computed, *limits)
        config = DPConfig(bounds=bounds)
        if not candidates:
            with pytest.raises(ConfigError, match="cannot be cut"):
                schedule(calls, computed, config, cost)
            continue
        found = schedule(calls, computed, config, cost)
        assert found in candidates
        assert obvious_cost(found, cost) == pytest.approx(min(obvious_cost(places, cost) for places in candidates))
        assert schedule_cost(found, cost) == pytest.approx(obvious_cost(found, cost))


def test_runs_start_from_the_cheapest_groups_and_from_equal_ones():
    cost = random_cost(10, 0)
    config = DPConfig()
    even = deepcache.schedule(10, 4, deepcache.DeepCacheConfig())
    assert [choice.places for choice in candidates(10, 4, config, cost)] == [schedule(10, 4, config, cost), even]
    flat = [[1.0] * 10 for _ in range(10)]
    (choice,) = candidates(10, 10, config, flat)  # both are the same
    assert choice == Choice(config, tuple(range(10)))


def test_it_is_never_worse_than_fixed_schedules_on_its_own_cost():
    for seed in range(20):
        cost = random_cost(30, seed)
        for computed in (3, 7, 15):
            best = schedule_cost(schedule(30, computed, DPConfig(), cost), cost)
            for fields in ({"form": "even"}, {"form": "paper", "center": 0, "power": 1.5}):
                other = deepcache.schedule(30, computed, deepcache.DeepCacheConfig(**fields))
                assert best <= schedule_cost(other, cost) + 1e-12


def test_more_computed_calls_never_cost_more():
    cost = random_cost(25, seed=7)
    costs = [schedule_cost(schedule(25, computed, DPConfig(), cost), cost) for computed in range(1, 26)]
    assert all(second <= first + 1e-12 for first, second in itertools.pairwise(costs))
    assert costs[-1] == 0


def test_what_was_not_profiled_is_not_chosen():
    cost = random_cost(12, seed=1)
    for first in range(12):
        cost[first][first + 4 :] = [float("inf")] * len(cost[first][first + 4 :])
    places = schedule(12, 3, DPConfig(), cost)
    assert places == (0, 4, 8)


@pytest.mark.parametrize("bounds", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_costs_that_are_not_finite_are_told_as_that(value, bounds):
    with pytest.raises(UnsupportedError, match="costs of reuse are not finite.*float16.*--device cpu"):
        schedule(6, 3, DPConfig(bounds=bounds), [[value] * 6] * 6)


@pytest.mark.parametrize("calls", range(1, 11))
def test_runs_may_move_calls_within_the_bounds_and_start_there(calls):
    bounded, free = DPConfig(bounds=True), DPConfig()
    for computed in range(1, calls + 1):
        interval = -(-calls // computed)
        inside = set(all_schedules(calls, computed, -(-interval // 2), 2 * interval))
        for places in all_schedules(calls, computed, 1, calls):
            assert permits(places, calls, bounded) == (places in inside)
            assert permits(places, calls, free)
        starts = candidates(calls, computed, bounded, random_cost(calls, computed))
        assert all(permits(choice.places, calls, bounded) for choice in starts)


@pytest.mark.parametrize("bounds", [True, False])
def test_whole_runs_keep_the_bounds(dit_folder, monkeypatch, bounds):
    def late(self, plan, tables=None):  # runs are the better the later their calls compute
        return 1000.0 - sum(place for place, code in enumerate(plan.codes["body"]) if code == "C")

    monkeypatch.setattr(search.PlanObjective, "error", late)
    fields = {"bounds": bounds, "cost": "feature", "correct": False, "trials": 60}
    config = SearchCacheConfig(macs_ratio=0.7, steps=12, samples=1, measure="never", method="dp", settings=fields)
    bundle = search_cache(dit_folder, config, output="out", device="cpu")
    plan = read_manifest(bundle).components["transformer"].cache.plan
    places = tuple(place for place, code in enumerate(plan.codes["body"]) if code == "C")
    assert permits(places, 12, DPConfig(bounds=True)) == bounds
