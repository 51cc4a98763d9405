from __future__ import annotations

import itertools

import pytest

from dacc.cache.moving import Choice, best_choice, shifted

WANTED = (0, 4, 9, 13)


class Runs:
    """Counts what is run; the error is the distance from places that are wanted."""

    def __init__(self, wanted=WANTED):
        self.wanted, self.seen = wanted, []

    def __call__(self, choice):
        self.seen.append(choice)
        return sum((one - other) ** 2 for one, other in zip(choice.places, self.wanted, strict=True))


def test_calls_move_to_where_runs_are_best_and_nothing_runs_twice():
    runs = Runs()
    trial = best_choice([Choice(None, (0, 1, 2, 3))], runs, calls=15, fixed=1, trials=200)
    assert trial.best.places == min(
        ((0, *rest) for rest in itertools.combinations(range(1, 15), 3)),
        key=lambda places: Runs()(Choice(None, places)),
    )
    assert trial.least == 0
    assert len(set(runs.seen)) == len(runs.seen) == trial.made < 200


def test_the_best_candidate_is_kept_and_all_of_them_are_run_whatever_is_allowed():
    candidates = [Choice(1, (0, 1, 2, 3)), Choice(2, (0, 4, 9, 12)), Choice(1, (0, 4, 9, 12))]
    runs = Runs()
    trial = best_choice(candidates, runs, calls=15, fixed=1, trials=1)
    assert runs.seen == candidates
    assert trial.best == candidates[1]  # of equals the first
    assert (trial.least, trial.made) == (1, 3)
    assert best_choice(candidates, Runs(), calls=15, fixed=1, trials=30).best == Choice(2, WANTED)


@pytest.mark.parametrize("trials", [1, 2, 5, 11])
def test_no_more_runs_are_made_than_are_allowed(trials):
    runs = Runs()
    assert best_choice([Choice(None, (0, 1, 2, 3))], runs, calls=15, fixed=1, trials=trials).made == trials
    assert len(runs.seen) == trials


def test_calls_that_warm_up_stay():
    runs = Runs((5, 6, 8, 10))
    trial = best_choice([Choice(None, (0, 1, 2, 3))], runs, calls=15, fixed=2, trials=300)
    assert trial.best.places == (0, 1, 8, 10)
    assert {choice.places[:2] for choice in runs.seen} == {(0, 1)}


def test_a_call_moves_between_its_neighbours_only():
    places = (0, 3, 4, 8)
    assert shifted(places, 1, -1, 9) == (0, 2, 4, 8)
    assert shifted(places, 3, -2, 9) == (0, 3, 4, 6)
    assert shifted(places, 1, -3, 9) is None
    assert shifted(places, 1, 1, 9) is None
    assert shifted(places, 2, 5, 9) is None
    assert shifted(places, 3, 1, 9) is None
    assert shifted(places, 3, 1, 10) == (0, 3, 4, 9)
    assert shifted((2, 3), 0, -3, 9) is None
    assert shifted((2, 3), 0, -2, 9) == (0, 3)


def test_a_candidate_with_a_fit_is_moved_with_it():
    def error(choice):
        far = sum((one - other) ** 2 for one, other in zip(choice.places, WANTED, strict=True))
        return far + {None: 1.0, 0.1: 0.5, 1e-4: 2.0}[choice.ridge]

    starts = [Choice(None, (0, 1, 2, 3), ridge) for ridge in (None, 0.1, 1e-4)]
    found = best_choice(starts, error, calls=15, fixed=1, trials=60)
    assert found.best == Choice(None, WANTED, 0.1)
    assert found.made <= 60


def test_runs_that_are_left_move_the_next_best_candidate():
    """The best one leads to a place that nothing near it beats, the next one to a better place."""
    valley = {(0, 3): 2.0, (0, 8): 3.0, (0, 9): 1.0}

    def error(choice):
        return valley.get(choice.places, 9.0)

    starts = [Choice(None, (0, 8)), Choice(None, (0, 3))]
    found = best_choice(starts, error, calls=12, fixed=1, trials=30)
    assert (found.best, found.least) == (Choice(None, (0, 9)), 1.0)
    assert best_choice(starts, error, calls=12, fixed=1, trials=4).best == Choice(None, (0, 3))
    assert set(found.errors) <= {Choice(None, (0, place)) for place in range(1, 12)}


def test_a_run_that_is_no_number_is_never_the_best():
    def error(choice):
        return float("nan") if choice.places[1] < 4 else float(choice.places[1])

    found = best_choice([Choice(1, (0, 2)), Choice(2, (0, 9))], error, calls=12, fixed=1, trials=20)
    assert found.best == Choice(2, (0, 4))


def test_calls_move_only_to_where_they_are_permitted():
    def permits(places):
        return all(after - before <= 6 for before, after in itertools.pairwise((*places, 15)))

    runs = Runs()
    start = [Choice(None, (0, 3, 6, 10))]
    trial = best_choice(start, runs, calls=15, fixed=1, trials=200, permits=permits)
    assert all(permits(choice.places) for choice in runs.seen)
    assert trial.best.places == WANTED
    far = best_choice(start, Runs((0, 11, 12, 13)), calls=15, fixed=1, trials=200, permits=permits)
    assert far.best.places == (0, 6, 12, 13)
    assert best_choice(start, Runs((0, 11, 12, 13)), calls=15, fixed=1, trials=200).best.places == (0, 11, 12, 13)
