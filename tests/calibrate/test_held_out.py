"""Which calls judge: a fair share of every place on the grid, and never one that is learned from."""

import pytest

from dacc.calibrate.held_out import split_calls
from dacc.core.errors import CalibrationError


def calls(rounds, places):
    """A call is its number; its place follows from it."""
    return list(range(rounds * places)), [number % places for number in range(rounds * places)]


@pytest.mark.parametrize("rounds", [2, 4, 10])
def test_a_tenth_of_the_calls_judges_and_every_step_is_learned_from(rounds):
    everything, places = calls(rounds, 50)
    learned, judged = split_calls(everything, places)
    assert len(judged) == rounds * 5
    assert sorted(learned + judged) == everything
    assert {places[call] for call in learned} == set(range(50))
    if rounds == 10:
        assert sorted(places[call] for call in judged) == list(range(50))


def test_a_short_run_still_has_a_judge():
    assert split_calls(*calls(2, 1)) == ([1], [0])


def test_a_single_call_is_refused():
    with pytest.raises(CalibrationError, match="1 denoiser call is too little.* --samples"):
        split_calls(*calls(1, 1))
