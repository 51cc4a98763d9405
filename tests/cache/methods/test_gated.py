from __future__ import annotations

import math

import pytest

from dacc.cache.methods.gated import TRIALS, GatedConfig, fit_threshold, gate, least, predictor, schedule
from dacc.core.errors import UnsupportedError


def test_warm_up_and_end_compute_whatever_the_gate_says():
    assert schedule(10, 5, GatedConfig(warmup=3, last_full=2)) == (0, 1, 2, 8, 9)
    assert schedule(3, 3, GatedConfig(warmup=5, last_full=1)) == (0, 1, 2)
    assert least(10, GatedConfig(warmup=3, last_full=2)) == 5
    assert least(3, GatedConfig(warmup=5)) == 3


def test_fields_reach_the_gate_and_the_predictor():
    found = gate(GatedConfig(signal="forecast", probe_order=3, max_consecutive=None), 0.25)
    assert (found.signal, found.order, found.threshold, found.max_consecutive) == ("forecast", 3, 0.25, None)
    assert predictor(GatedConfig(order=2)).order == 2
    assert predictor(GatedConfig(skip="reuse")) is None


@pytest.mark.parametrize("middle", [0.0003, 0.02, 0.1, 0.7, 30.0])
def test_the_threshold_meets_the_budget_from_below(middle):
    """Costs that fall in 50 steps around some threshold, as runs of 50 calls do."""
    asked: list[float] = []

    def cost(threshold: float) -> float:
        asked.append(threshold)
        return math.ceil(50 / (1 + threshold / middle)) / 50

    threshold, tried = fit_threshold(cost, 0.5, 0.02)
    assert tried == len(asked) <= TRIALS
    assert cost(threshold) <= 0.5
    assert cost(threshold) >= 0.4


def test_a_gate_that_may_not_skip_enough_is_refused_after_one_trial():
    asked: list[float] = []
    with pytest.raises(UnsupportedError, match="cost 0.600 of the full ones.*max_consecutive"):
        fit_threshold(lambda threshold: asked.append(threshold) or 0.6, 0.5, 0.02)
    assert len(asked) == 1
