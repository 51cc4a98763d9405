from __future__ import annotations

import pytest

from dacc.cache.methods.encoder import PAPER, EncoderConfig, least, schedule
from dacc.core.errors import ConfigError


@pytest.mark.parametrize("form", ["paper", "scaled"])
def test_nine_of_fifty_are_the_key_calls_of_the_paper(form):
    assert schedule(50, 9, EncoderConfig(form=form)) == (0, 1, 2, 3, 5, 10, 15, 25, 35) == PAPER


def test_whole_intervals():
    assert schedule(50, 10, EncoderConfig(form="interval")) == tuple(range(0, 50, 5))
    assert schedule(51, 17, EncoderConfig(form="interval")) == tuple(range(0, 51, 3))


@pytest.mark.parametrize("calls", [1, 7, 20, 51, 100])
def test_any_number_fits_in_any_run_and_they_get_sparser(calls):
    for computed in range(1, calls + 1):
        places = schedule(calls, computed, EncoderConfig())
        assert len(places) == computed
        assert places[0] == 0
        assert list(places) == sorted(set(places))
        assert places[-1] < calls
        early = sum(place < calls / 2 for place in places)
        assert early >= computed - early


def test_twice_the_calls_have_the_key_calls_at_the_same_share_of_the_run():
    assert schedule(100, 9, EncoderConfig()) == tuple(2 * place for place in PAPER)


def test_the_key_calls_of_the_paper_are_for_its_number_of_calls():
    with pytest.raises(ConfigError, match="9 of 50.*form=paper"):
        schedule(49, 20, EncoderConfig(form="paper"))
    assert [least(50, EncoderConfig(form=form)) for form in ("paper", "scaled")] == [9, 1]
