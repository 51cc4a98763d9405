"""The choice is the best of all that the rules permit."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from dacc.prune.select import Item, Rules, cheapest, greedily, largest, of_each_cost, permitted

RULES = {
    "no neighbours": Rules(),
    "neighbours": Rules(allow_adjacent=True),
    "2 of 3": Rules(allow_adjacent=True, groups=(2, 3)),
    "3 of 4, no neighbours": Rules(groups=(3, 4)),
}


def items_of(seed: int, *, even: bool = False) -> list[Item]:
    dice = random.Random(seed)
    counts = (dice.randint(3, 7), dice.randint(1, 5))
    return [
        Item(dice.random() ** 3, 10 if even else dice.randint(1, 40), stack, position)
        for stack, count in zip("ab", counts, strict=True)
        for position in range(count)
    ]


def is_permitted(items: list[Item], places: tuple[int, ...], rules: Rules) -> bool:
    """The rules, written down once more."""
    chosen = [items[place] for place in places]
    for one, other in combinations(chosen, 2):
        near = one.stack == other.stack and abs(one.position - other.position) == 1
        if near and not rules.allow_adjacent:
            return False
    if rules.groups:
        keep, of = rules.groups
        groups = [(item.stack, item.position // of) for item in chosen]
        return all(groups.count(group) <= of - keep for group in groups)
    return True


def all_sets(items: list[Item], rules: Rules) -> list[tuple[int, ...]]:
    every = [places for count in range(len(items) + 1) for places in combinations(range(len(items)), count)]
    return [places for places in every if is_permitted(items, places, rules)]


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("seed", range(8))
def test_it_is_what_trying_all_sets_finds(rules, seed):
    items = items_of(seed, even=seed % 2 == 0)
    sets = all_sets(items, rules)
    costs = {places: sum(items[place].cost for place in places) for places in sets}
    assert largest(items, rules) == max(costs.values())
    for share in (0.1, 0.25, 0.5, 0.8):
        needed = max(1, round(share * sum(item.cost for item in items)))
        scores = [sum(items[place].score for place in places) for places in sets if costs[places] >= needed]
        found = cheapest(items, needed, rules)
        if not scores:
            assert found is None
            continue
        assert found in sets
        assert costs[found] >= needed
        assert sum(items[place].score for place in found) == pytest.approx(min(scores))


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("seed", range(4))
def test_of_each_cost_it_is_the_best_that_trying_all_sets_finds(rules, seed):
    items = items_of(seed, even=seed % 2 == 0)
    bound, best = sum(item.cost for item in items) // 2, dict[int, float]()
    for places in all_sets(items, rules):
        cost, score = (sum(getattr(items[place], part) for place in places) for part in ("cost", "score"))
        if cost <= bound:
            best[cost] = min(score, best.get(cost, score))
    found = of_each_cost(items, bound, rules)
    assert all(is_permitted(items, places, rules) for places in found.values())
    assert {cost: sum(items[place].score for place in places) for cost, places in found.items()} == pytest.approx(best)


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_permitted_sets_are_told_from_others(rules):
    items = items_of(3)[:8]
    for count in range(5):
        for places in combinations(range(len(items)), count):
            assert permitted(items, places, rules) == is_permitted(items, places, rules)


@pytest.mark.parametrize("seed", range(4))
def test_greedy_choice_reaches_the_target_within_the_rules_where_a_wrong_step_would_not(seed):
    items, rules = items_of(seed), Rules()
    needed = largest(items, rules)
    found = greedily(items, needed, rules, lambda removed, places: [items[place].score for place in places])
    assert is_permitted(items, found, rules)
    assert sum(items[place].cost for place in found) >= needed


def test_greedy_choice_follows_scores_that_change():
    items = [Item(0, 1, "a", 2 * place) for place in range(4)]

    def scores(removed: tuple[int, ...], places: list[int]) -> list[float]:
        """The first is cheap alone, and dear once another one has gone."""
        return [{0: 5.0 if removed else 0.1, 1: 1.0, 2: 0.2, 3: 0.3}[place] for place in places]

    assert greedily(items, 2, Rules(), scores) == (0, 2)
    assert greedily(items, 3, Rules(), lambda removed, places: [float(place in (0, 2)) for place in places]) == (
        0,
        1,
        3,
    )


def test_greedy_choice_asks_what_one_more_adds_and_not_what_all_lose():
    items = [Item(0, cost, "a", 2 * place) for place, cost in enumerate((4, 2, 8))]
    lost = {(0,): 0.4, (1,): 0.3, (2,): 8.0, (0, 1): 0.45, (0, 2): 1.5}  # for its cost (0, 2) loses less than (0, 1)

    def scores(removed: tuple[int, ...], places: list[int]) -> list[float]:
        return [lost[tuple(sorted((*removed, place)))] for place in places]

    assert greedily(items, 6, Rules(), scores) == (0, 1)
