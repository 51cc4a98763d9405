import math
from itertools import pairwise
from random import Random
from statistics import NormalDist, fmean, pstdev

import pytest

from dacc.calibrate.strategies.ndtc import CONFIG, draw_timestep, kept_calls

DRAWS, T = 100_000, 250


def draws(**fields: object) -> list[int]:
    random = Random(1)
    return [draw_timestep(T, CONFIG(**fields), random) for _ in range(DRAWS)]


def expected(mu: float, sd: float) -> list[float]:
    """Probability of each t, from the formula: floor, then clamp."""
    normal = NormalDist(mu, sd)
    edges = [-math.inf, *range(1, T), math.inf]
    share = [0.0 if edge == -math.inf else 1.0 if edge == math.inf else normal.cdf(edge) for edge in edges]
    return [above - below for below, above in pairwise(share)]


@pytest.mark.parametrize(
    ("fields", "mu", "sd"),
    [
        ({}, 0.4 * T, 0.4 * T),
        ({"form": "paper"}, 0.4 * T, math.sqrt(T / 2)),
        ({"mu_fraction": 0.5, "sd_fraction": 0.35}, 0.5 * T, 0.35 * T),
    ],
)
def test_draws_follow_the_clamped_normal_distribution(fields: dict[str, object], mu: float, sd: float) -> None:
    found, shares = draws(**fields), expected(mu, sd)
    mean = sum(t * share for t, share in enumerate(shares))
    spread = math.sqrt(sum((t - mean) ** 2 * share for t, share in enumerate(shares)))
    assert fmean(found) == pytest.approx(mean, abs=4 * spread / math.sqrt(DRAWS))
    assert pstdev(found) == pytest.approx(spread, rel=0.01)


def test_the_ends_take_what_is_clamped() -> None:
    found = draws()
    assert found.count(0) / DRAWS == pytest.approx(0.159 + 0.001, abs=0.004)
    assert found.count(T - 1) / DRAWS == pytest.approx(0.067 + 0.001, abs=0.003)
    assert (min(found), max(found)) == (0, T - 1)


def test_the_paper_form_is_narrow() -> None:
    assert pstdev(draws(form="paper")) == pytest.approx(math.sqrt(T / 2), rel=0.01)


def test_draws_count_from_the_clean_end_and_fewer_samples_are_the_first_ones() -> None:
    kept = kept_calls(T, 2000, CONFIG(mu_fraction=0.1, sd_fraction=0.05), Random(0))
    assert fmean(call for (call,) in kept) == pytest.approx(0.9 * T, abs=3)
    assert kept_calls(T, 5, CONFIG(), Random(0)) == kept_calls(T, 50, CONFIG(), Random(0))[:5]
