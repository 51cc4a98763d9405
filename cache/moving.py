"""Which of some plans of a unit is best, and moving its computed calls for as long as whole runs get better.

What a placement does is predicted call by call, with the inputs of runs that compute everything (`cache/placing.py`,
`cache/cost.py`); a run adds up what its forecasts do to each other. So runs decide at the end: those of all candidates,
then of neighbours of the best, that have a computed call earlier or later; then fitted forecasts are tried, and
neighbours again.

Letters: C calls of a run, K calls that compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

Places = tuple[int, ...]  # calls that compute, ascending


@dataclass(frozen=True)
class Choice:
    """One placement of K calls, the fields of the method that it is for, and how far its forecasts are fitted."""

    settings: Any
    places: Places
    ridge: float | None = None  # None: not at all


def anywhere(places: Places) -> bool:
    """No place is forbidden."""
    return True


@dataclass
class Trial:
    """The runs that were made: the best choice so far, its error, how many are allowed and were made."""

    error: Callable[[Choice], float]
    allowed: int
    permits: Callable[[Places], bool] = anywhere  # whether calls may be moved there
    best: Choice | None = None
    least: float = float("inf")
    made: int = 0
    _seen: set[tuple[str, Places, float | None]] = field(default_factory=set)

    def improves(self, choice: Choice) -> bool:
        """Run it, unless it was or no run is left; whether it is the best now."""
        name = repr(choice.settings), choice.places, choice.ridge
        if name in self._seen or self.made == self.allowed:
            return False
        self._seen.add(name)
        self.made += 1
        error = self.error(choice)
        error = float("inf") if math.isnan(error) else error  # a run that overflows is no run to follow
        if self.best is not None and error >= self.least:
            return False
        self.best, self.least = choice, error
        return True


def best_choice(
    candidates: Sequence[Choice],
    error: Callable[[Choice], float],
    *,
    calls: int,
    fixed: int,
    trials: int,
    ridges: Sequence[float] = (),
    permits: Callable[[Places], bool] = anywhere,
) -> Trial:
    """Run all candidates, then move calls of the best, up to `trials` runs in all (of all candidates in any case).

    Args:
        candidates: at least one.
        error: of a run, less is better.
        calls: C.
        ridges: of fits that are tried once two thirds of the runs are made.
        fixed: so many calls at the start stay.
        permits: whether calls may be moved so; the candidates are run whatever it says.

    Returns:
        The runs; `best` is set.
    """
    allowed = max(trials, len(candidates))
    later = (allowed - len(candidates)) // 3 if ridges else 0  # runs for fits, and moves with the best of them
    trial = Trial(error, allowed - later, permits)
    for choice in candidates:
        trial.improves(choice)
    _move(trial, calls, fixed)
    trial.allowed = allowed
    assert trial.best is not None
    for choice in [replace(trial.best, ridge=ridge) for ridge in ridges]:
        trial.improves(choice)
    _move(trial, calls, fixed)
    return trial


def _move(trial: Trial, calls: int, fixed: int) -> None:
    """Sweep over the calls for as long as that helps and runs are left."""
    while trial.made < trial.allowed and _sweep(trial, calls, fixed):
        pass


def _sweep(trial: Trial, calls: int, fixed: int) -> bool:
    """Try to move every call, from the last on, each time it helps twice as far; whether anything did."""
    helped = False
    assert trial.best is not None
    for number in reversed(range(fixed, len(trial.best.places))):
        for by in (-1, 1):
            moved = False
            while (
                (places := shifted(trial.best.places, number, by, calls))
                and trial.permits(places)
                and trial.improves(replace(trial.best, places=places))
            ):
                moved, by = True, 2 * by
            helped |= moved
            if moved:
                break
    return helped


def shifted(places: Places, number: int, by: int, calls: int) -> Places | None:
    """The places with one moved; None where another call or the end of the run is in its way."""
    place = places[number] + by
    before, after = places[number - 1] if number else -1, (*places, calls)[number + 1]
    return (*places[:number], place, *places[number + 1 :]) if before < place < after else None
