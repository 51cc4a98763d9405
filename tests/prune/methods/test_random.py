"""Draws within the rules, the same for the same seed."""

from __future__ import annotations

from itertools import pairwise

import pytest

from dacc.core.errors import UnsupportedError

from .. import toys
from ..asked import ask, select, share


def test_it_reaches_the_ratio_within_the_rules_and_follows_the_seed():
    toy, found = toys.dit(num_layers=12), set()
    for seed in range(6):
        request = ask(toy, 0.3, seed=seed)
        removed = select("random", request)
        assert removed == select("random", ask(toy, 0.3, seed=seed))
        assert share(request, removed) >= 0.95 * 0.3
        places = sorted(int(name.rpartition(".")[2]) for name in removed)
        assert all(after - before > 1 for before, after in pairwise(places))
        found.add(removed)
    assert len(found) > 2


def test_a_ratio_out_of_reach_is_refused():
    with pytest.raises(UnsupportedError, match="--ratio"):
        select("random", ask(toys.dit(num_layers=12), 0.9))
