"""Units drawn at random until the ratio is reached: what other methods have to beat. Another `--seed` draws others."""

from __future__ import annotations

from random import Random

from ..request import Request
from ..select import Item, greedily, largest
from ..settings import MethodConfig


class RandomConfig(MethodConfig):
    """There are no fields but the shared ones, which do nothing here."""


CONFIG = RandomConfig
NEEDS = ()
NEEDS_RATIO = True


def select(request: Request, config: RandomConfig) -> tuple[str, ...]:
    """The modules to remove.

    Raises:
        UnsupportedError: the ratio is out of reach.
    """
    items = [Item(0.0, request.costs[unit.name], unit.stack, unit.position) for unit in request.units]
    rules, dice = request.rules(), Random(request.seed)
    if largest(items, rules) < request.needed():
        raise request.out_of_reach(largest(items, rules))

    def drawn(removed: tuple[int, ...], candidates: list[int]) -> list[float]:
        """The first of a shuffled row; scores are divided by what an item costs."""
        order = dice.sample(candidates, len(candidates))
        return [order.index(place) * max(items[place].cost, 1) for place in candidates]

    places = greedily(items, request.needed(), rules, drawn)
    return tuple(name for place in places for name in request.units[place].modules)
