from __future__ import annotations

import pytest

from dacc.cache.methods.deepcache import DeepCacheConfig, schedule
from dacc.core.errors import ConfigError

PAPER = (0, 5, 10, 13, 15, 19, 24, 29, 35, 42)
CODE = (0, 5, 9, 13, 17, 21, 26, 31, 37, 43)
ONE_SIDED = (0, 1, 4, 8, 12, 17, 23, 29, 35, 42)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"form": "paper", "center": 15, "power": 1.4}, PAPER),
        ({"form": "code", "center": 15, "power": 1.4}, CODE),
        ({"form": "paper", "center": 0, "power": 1.5}, ONE_SIDED),
        ({"form": "interval"}, tuple(range(0, 50, 5))),
        ({"form": "even"}, tuple(range(0, 50, 5))),
    ],
)
def test_known_schedules_of_ten_in_fifty_calls(fields, expected):
    assert schedule(50, 10, DeepCacheConfig(**fields)) == expected


@pytest.mark.parametrize("calls", [7, 20, 50, 51])
@pytest.mark.parametrize("form", ["even", "interval", "paper"])
def test_every_budget_gives_an_ascending_schedule_that_begins_at_0_and_keeps_to_it(calls, form):
    for computed in range(1, calls + 1):
        places = schedule(calls, computed, DeepCacheConfig(form=form, center=5))
        assert places[0] == 0
        assert list(places) == sorted(set(places))
        assert places[-1] < calls
        assert len(places) <= computed
        if form == "even":
            assert len(places) == computed


def test_a_whole_interval_covers_runs_that_it_does_not_divide():
    assert schedule(50, 17, DeepCacheConfig(form="interval")) == tuple(range(0, 50, 3))
    assert schedule(51, 10, DeepCacheConfig(form="interval")) == tuple(range(0, 51, 6))


def test_the_power_law_as_coded_gives_exactly_as_many_calls_or_refuses():
    assert len(schedule(50, 5, DeepCacheConfig(form="code", center=15, power=1.4))) == 5
    with pytest.raises(ConfigError, match="no 49 of 50 calls.*center"):
        schedule(50, 49, DeepCacheConfig(form="code"))


def test_the_same_question_has_the_same_answer():
    assert schedule(50, 9, DeepCacheConfig(form="code")) == schedule(50, 9, DeepCacheConfig(form="code"))
