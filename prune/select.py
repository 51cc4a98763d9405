"""Which units go: the cheapest set that is large enough, exactly.

    minimise  sum of s over the removed units    so that    sum of c over the removed units >= C

with s what it costs to miss a unit and c its size. Of all partial choices only those are kept that no other beats in
both sums, for each state that the rules depend on, so that the result is the best one and not an approximation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

State = tuple[str, int, int]  # stack, position of the last removed unit, how many are removed from its group
START: State = ("", -2, 0)


@dataclass(frozen=True)
class Item:
    """A unit as the choice sees it."""

    score: float
    cost: int
    stack: str
    position: int


@dataclass(frozen=True)
class Rules:
    """What may go together.

    Args:
        allow_adjacent: neighbours in a stack may both go.
        groups: (N, M): of M blocks in a row at least N stay, counted from the first one of a stack.
    """

    allow_adjacent: bool = False
    groups: tuple[int, int] | None = None

    def after(self, state: State, item: Item) -> State | None:
        """The state once `item` is removed too; None where it has to stay."""
        stack, last, count = state if state[0] == item.stack else (item.stack, -2, 0)
        if not self.allow_adjacent and last == item.position - 1:
            return None
        if self.groups is None:
            return (stack, item.position, 0)
        keep, of = self.groups
        count = count + 1 if last >= 0 and last // of == item.position // of else 1
        return (stack, item.position, count) if count <= of - keep else None


@dataclass(frozen=True)
class _Partial:
    score: float
    cost: int
    places: tuple[int, ...]


def cheapest(items: Sequence[Item], needed: int, rules: Rules) -> tuple[int, ...] | None:
    """Places of the items to remove, ascending; None when no permitted set reaches `needed`.

    Items of a stack follow each other by position. Of equally cheap sets the smaller one is taken, then the first.
    """
    fits = [found for found in _front(items, needed, rules) if found.cost >= needed]
    best = min(fits, key=_rank, default=None)
    return best.places if best else None


def of_each_cost(items: Sequence[Item], at_most: int, rules: Rules) -> dict[int, tuple[int, ...]]:
    """Cost of a permitted set -> places of the cheapest one of that very cost, up to a bound; 0 among them."""
    best: dict[tuple[State, int], _Partial] = {(START, 0): _Partial(0.0, 0, ())}
    for place, item in enumerate(items):
        for (state, cost), one in list(best.items()):
            after = rules.after(state, item)
            if after is None or cost + item.cost > at_most:
                continue
            added = _Partial(one.score + item.score, cost + item.cost, (*one.places, place))
            known = best.setdefault((after, added.cost), added)
            best[after, added.cost] = min(known, added, key=_rank)
    found: dict[int, _Partial] = {}
    for one in sorted(best.values(), key=_rank):
        found.setdefault(one.cost, one)
    return {cost: one.places for cost, one in found.items()}


def largest(items: Sequence[Item], rules: Rules) -> int:
    """The cost of the largest permitted set."""
    return max(found.cost for found in _front(items, sum(item.cost for item in items), rules))


def greedily(
    items: Sequence[Item], needed: int, rules: Rules, scores: Callable[[tuple[int, ...], list[int]], list[float]]
) -> tuple[int, ...]:
    """Remove one after the other, the one that adds least to the score for its cost, with scores found anew each time:
    for scores that do not add up. `needed` has to be reachable.

    Args:
        scores: of what is removed, with each of some candidates in addition: (removed, candidates) -> one for each.
    """
    removed: tuple[int, ...] = ()
    before = 0.0  # score of `removed`
    while sum(items[place].cost for place in removed) < needed:
        candidates = [
            place
            for place in range(len(items))
            if place not in removed and _can_end(items, (*removed, place), needed, rules)
        ]
        found = dict(zip(candidates, scores(removed, candidates), strict=True))
        best = min(candidates, key=lambda place: ((found[place] - before) / max(items[place].cost, 1), place))
        removed, before = tuple(sorted((*removed, best))), found[best]
    return removed


def permitted(items: Sequence[Item], places: Sequence[int], rules: Rules) -> bool:
    """Whether these may go together."""
    state: State | None = START
    for place in sorted(places):
        assert state is not None
        if (state := rules.after(state, items[place])) is None:
            return False
    return True


def _rank(found: _Partial) -> tuple[float, int, tuple[int, ...]]:
    return found.score, len(found.places), found.places


def _can_end(items: Sequence[Item], removed: tuple[int, ...], needed: int, rules: Rules) -> bool:
    """Whether a set is permitted and some larger or equal one reaches `needed`."""
    if not permitted(items, removed, rules):
        return False
    return any(found.cost >= needed for found in _front(items, needed, rules, forced=frozenset(removed)))


def _front(items: Sequence[Item], needed: int, rules: Rules, forced: frozenset[int] = frozenset()) -> list[_Partial]:
    """All sets that no other beats, in each state at the end."""
    states: dict[State, list[_Partial]] = {START: [_Partial(0.0, 0, ())]}
    for place, item in enumerate(items):
        grown: dict[State, list[_Partial]] = {}
        for state, found in states.items():
            if place not in forced:
                grown.setdefault(state, []).extend(found)
            if (after := rules.after(state, item)) is not None:
                added = [
                    _Partial(one.score + item.score, min(one.cost + item.cost, needed), (*one.places, place))
                    for one in found
                ]
                grown.setdefault(after, []).extend(added)
        states = {state: _unbeaten(found) for state, found in grown.items()}
    return [partial for found in states.values() for partial in found]


def _unbeaten(found: list[_Partial]) -> list[_Partial]:
    kept: list[_Partial] = []
    for one in sorted(found, key=lambda part: (part.score, -part.cost, len(part.places), part.places)):
        if not kept or one.cost > kept[-1].cost:
            kept.append(one)
    return kept
