from __future__ import annotations

from itertools import pairwise

import pytest
from pydantic import ValidationError

from dacc.cache.fitting import RIDGES
from dacc.cache.methods.taylor import TaylorConfig, candidates, least, needs, predictor, schedule


def as_published(calls: int, interval: int, first_enhance: int) -> tuple[int, ...]:
    """Slow and obvious: a counter, as the paper tells it."""
    found, counter = [], 0
    for call in range(calls):
        if call < first_enhance or counter == interval - 1:
            found.append(call)
            counter = 0
        else:
            counter += 1
    return tuple(found)


@pytest.mark.parametrize("calls", [20, 50, 51])
@pytest.mark.parametrize("warmup", [1, 2, 3])
def test_an_interval_is_the_published_schedule_of_the_densest_that_fits(calls, warmup):
    for computed in range(warmup, calls + 1):
        fitting = (as_published(calls, interval, warmup) for interval in range(1, calls + 1))
        expected = next(places for places in fitting if len(places) <= computed)
        assert schedule(calls, computed, TaylorConfig(warmup=warmup, spacing="interval")) == expected


def test_searched_calls_are_those_whose_forecasts_cost_least():
    worth = [0.0, 1, 1, 1, 1, 50, 1, 1, 1, 1]

    def cost(history: tuple[int, ...], call: int) -> float:
        return worth[call] * (call - history[-1])

    assert 5 in schedule(10, 3, TaylorConfig(), cost)
    assert schedule(10, 3, TaylorConfig(warmup=2), cost)[:2] == (0, 1)
    assert needs(TaylorConfig()) == ("forecasts",)
    assert needs(TaylorConfig(spacing="even")) == ()


class Costs:
    """What forecasts cost, and fitted ones."""

    def __init__(self, fitted: Costs | None = None) -> None:
        self.fitted = fitted

    def __call__(self, history: tuple[int, ...], call: int) -> float:
        far = call - history[-1]
        return far * ((5.0 - len(history) if call > 5 else 1.0) if self.fitted is None else 1.0 + (call < 4))


def test_runs_choose_between_orders_and_between_searched_and_equal_distances():
    cost = Costs()
    found = candidates(10, 4, TaylorConfig(), cost)
    assert [choice.settings.order for choice in found] == [1, 1, 2, 2, 3, 3]
    assert len({choice.places for choice in found[::2]}) > 1
    assert {choice.places for choice in found[1::2]} == {schedule(10, 4, TaylorConfig(spacing="even"))}
    for choice in found[::2]:
        assert choice.places == schedule(10, 4, choice.settings, cost)
    assert [choice.settings.order for choice in candidates(10, 4, TaylorConfig(order=2), cost)] == [2, 2]
    assert predictor(TaylorConfig()).order == 2  # where nothing chooses


def test_fits_are_tried_at_equal_distances_and_where_they_are_placed_best():
    fitted = Costs()
    cost = Costs(fitted)
    found = candidates(10, 4, TaylorConfig(order=2), cost)
    assert [choice.ridge for choice in found] == [None, None, *(ridge for ridge in RIDGES for _ in range(2))]
    own = found[0].settings
    placed, even = schedule(10, 4, own, fitted), found[1].places
    assert placed not in (found[0].places, even)
    assert [choice.places for choice in found[2:]] == [placed, even] * len(RIDGES)


def test_a_search_for_forecasts_of_many_values_is_refused():
    with pytest.raises(ValidationError, match="order 1 to 3, not 4"):
        TaylorConfig(order=4)
    assert TaylorConfig(order=4, spacing="even").order == 4


@pytest.mark.parametrize("calls", [7, 20, 51])
def test_even_spacing_uses_the_whole_budget_at_distances_that_differ_by_one(calls):
    for warmup in (1, 2, 3):
        for computed in range(warmup, calls + 1):
            places = schedule(calls, computed, TaylorConfig(warmup=warmup, spacing="even"))
            assert len(places) == computed
            assert places[:warmup] == tuple(range(warmup))
            assert places[-1] < calls
            behind = (*places[warmup - 1 :], calls)
            gaps = {after - before for before, after in pairwise(behind)}
            assert max(gaps) - min(gaps) <= 1


def test_without_a_warm_up_even_spacing_is_that_of_deepcache():
    from dacc.cache.methods import deepcache

    even = deepcache.DeepCacheConfig()
    assert schedule(50, 9, TaylorConfig(spacing="even")) == deepcache.schedule(50, 9, even)


def test_the_warm_up_computes_in_any_plan():
    assert least(50, TaylorConfig(warmup=4)) == len(schedule(50, 4, TaylorConfig(warmup=4, spacing="even"))) == 4
    assert least(3, TaylorConfig(warmup=4)) == 3


def test_the_fields_say_how_the_other_calls_are_forecast():
    found = predictor(TaylorConfig(order=3, form="published", x="sigma"))
    assert (found.kind, found.order, found.form, found.x) == ("taylor", 3, "published", "sigma")
