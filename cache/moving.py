"""Which of some plans of a unit is best, and moving its computed calls for as long as whole runs get better.

What a placement does is predicted call by call, with the inputs of runs that compute everything (`cache/placing.py`,
`cache/cost.py`); a run adds up what its forecasts do to each other. So runs decide at the end: those of all candidates,
then of neighbours of the best, that have a computed call earlier or later.

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
    """The runs that are made: their errors, and how many are allowed."""

    error: Callable[[Choice], float]
    allowed: int
    permits: Callable[[Places], bool] = anywhere  # whether calls may be moved there
    errors: dict[Choice, float] = field(default_factory=dict)

    @property
    def made(self) -> int:
        """How many there were."""
        return len(self.errors)

    @property
    def best(self) -> Choice:
        """The one with the least error, of equals the first."""
        return min(self.errors, key=lambda choice: self.errors[choice])

    @property
    def least(self) -> float:
        """Its error."""
        return self.errors[self.best]

    def of(self, choice: Choice) -> float:
        """The error of a run, which is made unless it was; infinite where no run is left."""
        if choice not in self.errors:
            if self.made == self.allowed:
                return math.inf
            error = self.error(choice)
            self.errors[choice] = math.inf if math.isnan(error) else error  # a run that overflows is none to follow
        return self.errors[choice]


def best_choice(
    candidates: Sequence[Choice],
    error: Callable[[Choice], float],
    *,
    calls: int,
    fixed: int,
    trials: int,
    permits: Callable[[Places], bool] = anywhere,
) -> Trial:
    """Run all candidates, then move calls of the best for as long as that helps, of the second best and so on, up to
    `trials` runs in all (of all candidates in any case).

    Args:
        candidates: at least one.
        error: of a run, less is better.
        calls: C.
        fixed: so many calls at the start stay.
        permits: whether calls may be moved so; the candidates are run whatever it says.

    Returns:
        The runs.
    """
    trial = Trial(error, max(trials, len(candidates)), permits)
    for start in sorted(candidates, key=trial.of):
        best: Choice | None = start
        while best is not None and trial.made < trial.allowed:
            best = _sweep(trial, best, calls, fixed)
    return trial


def _sweep(trial: Trial, start: Choice, calls: int, fixed: int) -> Choice | None:
    """Try to move every call, from the last on, each time it helps twice as far; what that led to, None where nothing
    helped."""
    best = start
    for number in reversed(range(fixed, len(best.places))):
        for by in (-1, 1):
            moved = False
            while (places := shifted(best.places, number, by, calls)) and trial.permits(places):
                further = replace(best, places=places)
                if not trial.of(further) < trial.of(best):
                    break
                best, moved, by = further, True, 2 * by
            if moved:
                break
    return None if best == start else best


def shifted(places: Places, number: int, by: int, calls: int) -> Places | None:
    """The places with one moved; None where another call or the end of the run is in its way."""
    place = places[number] + by
    before, after = places[number - 1] if number else -1, (*places, calls)[number + 1]
    return (*places[:number], place, *places[number + 1 :]) if before < place < after else None
