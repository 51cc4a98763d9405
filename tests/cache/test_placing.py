from __future__ import annotations

import itertools
import random

import pytest

from dacc.cache.placing import place_calls
from dacc.core.errors import ConfigError


def total(places, calls, order, cost):
    """Slow and obvious: every call that does not compute, from the last computed ones before it."""
    return sum(
        cost(tuple(place for place in places if place < call)[-order - 1 :], call)
        for call in range(calls)
        if call not in places
    )


def random_cost(seed):
    known = {}

    def cost(history, call):
        key = history, call
        return known.setdefault(key, random.Random(f"{seed} {key}").random())

    return cost


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("warmup", [1, 2])
def test_no_other_places_cost_less(order, warmup):
    calls = 9
    for computed in range(warmup, calls + 1):
        cost = random_cost(computed)
        found = place_calls(calls, computed, order, cost, warmup=warmup, longest=calls)
        head, free = tuple(range(warmup)), range(warmup, calls)
        every = [(*head, *rest) for rest in itertools.combinations(free, computed - warmup)]
        assert found in every
        assert total(found, calls, order, cost) == pytest.approx(min(total(one, calls, order, cost) for one in every))


def test_distances_stay_within_the_longest():
    found = place_calls(12, 4, 1, lambda history, call: float(call < 9), longest=4)
    assert max(after - before for before, after in itertools.pairwise((*found, 12))) <= 4
    with pytest.raises(ConfigError, match="3 of 12 calls at distances of at most 3"):
        place_calls(12, 3, 1, random_cost(0), longest=3)


def test_order_0_is_the_programme_over_groups():
    from dacc.cache.methods import dp

    calls, rng = 12, random.Random(3)
    table = [[rng.random() if call > first else 0.0 for call in range(calls)] for first in range(calls)]
    for computed in (1, 3, 7):
        found = place_calls(calls, computed, 0, lambda history, call: table[history[-1]][call], longest=calls)
        assert found == dp.schedule(calls, computed, dp.DPConfig(), table)
