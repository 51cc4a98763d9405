from __future__ import annotations

import pytest

from dacc.cache.budget import computed_calls
from dacc.core.errors import UnsupportedError


@pytest.mark.parametrize("partial", [0.0, 0.1, 0.25, 0.5])
@pytest.mark.parametrize("calls", [4, 20, 50])
def test_it_is_the_most_that_fits(calls, partial):
    for ratio in (0.65, 0.75, 0.9):
        found = computed_calls(calls, ratio, partial, wish="macs")
        assert found + (calls - found) * partial <= ratio * calls + 1e-9
        assert found == calls or (found + 1) + (calls - found - 1) * partial > ratio * calls


def test_a_target_out_of_reach_names_the_best_one():
    with pytest.raises(UnsupportedError, match=r"speed-up of 4: .* costs 0.500 .* 50 calls is --speedup 1.96"):
        computed_calls(50, 0.25, 0.5, wish="speedup")
    with pytest.raises(UnsupportedError, match=r"MAC ratio of 0.3: .* --macs-ratio 0.510"):
        computed_calls(50, 0.3, 0.5, wish="macs")


def test_calls_that_compute_whatever_is_asked_for_bound_the_target():
    assert computed_calls(50, 0.58, 0.5, wish="macs", least=8) == 8
    told = r"costs 0.500 of a full one, and at least 9 calls compute. .* --macs-ratio 0.590"
    with pytest.raises(UnsupportedError, match=told):
        computed_calls(50, 0.58, 0.5, wish="macs", least=9)


@pytest.mark.parametrize(("wish", "calls"), [("speedup", 10), ("speedup", 1), ("macs", 1)])
def test_where_nothing_is_saved_no_smaller_target_is_advised(wish, calls):
    with pytest.raises(UnsupportedError, match="With .* calls it saves nothing.*--unit, or another --method") as told:
        computed_calls(calls, 0.5, 1.1 if calls > 1 else 0.1, wish=wish)
    assert "--speedup" not in str(told.value)
    assert "--macs-ratio" not in str(told.value)
