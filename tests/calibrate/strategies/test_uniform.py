from itertools import pairwise
from random import Random

import pytest

from dacc.calibrate.strategies.uniform import CONFIG, kept_calls


@pytest.mark.parametrize(("calls", "timesteps"), [(100, 20), (50, 20), (7, 3), (4, 20), (1, 1), (20, 20)])
def test_calls_are_spread_evenly_from_the_first(calls: int, timesteps: int) -> None:
    kept, again = kept_calls(calls, 2, CONFIG(timesteps=timesteps), Random(0))
    assert kept == again
    assert len(kept) == min(timesteps, calls)
    assert kept[0] == 0
    gaps = {later - earlier for earlier, later in pairwise((*kept, calls))}
    assert max(gaps) - min(gaps) <= 1


def test_where_the_number_divides_it_is_every_nth_call() -> None:
    assert kept_calls(100, 1, CONFIG(timesteps=20), Random(0)) == [tuple(range(0, 100, 5))]
