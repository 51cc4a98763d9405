import numpy
import pytest

from dacc.evaluate.statistics import bootstrap_interval, summarize, wilson_interval

WILSON = [  # successes, count, and what scipy.stats.binomtest(...).proportion_ci(method="wilson") gives
    (0, 10, 0.0, 0.2775328),
    (10, 10, 0.7224672, 1.0),
    (1, 3, 0.061491945, 0.792340399),
    (87, 100, 0.790196486, 0.922428326),
    (500, 1000, 0.4690696, 0.5309304),
]


@pytest.mark.parametrize(("successes", "count", "low", "high"), WILSON)
def test_wilson_agrees_with_scipy(successes: int, count: int, low: float, high: float) -> None:
    assert wilson_interval(successes, count) == pytest.approx((low, high), abs=1e-8)


def test_the_bootstrap_interval_covers_the_mean_about_as_often_as_it_promises() -> None:
    generator = numpy.random.default_rng(1)
    inside = 0
    for _ in range(200):
        low, high = bootstrap_interval(generator.exponential(size=40))
        inside += low <= 1.0 <= high
    assert 0.86 <= inside / 200 <= 0.99


def test_one_value_has_an_interval_of_no_width() -> None:
    assert bootstrap_interval([3.0]) == (3.0, 3.0)


def test_the_worst_image_follows_the_direction() -> None:
    higher = summarize([1.0, 3.0, 2.0], [10, 11, 12], better="higher")
    lower = summarize([1.0, 3.0, 2.0], [10, 11, 12], better="lower")
    assert (higher.worst, higher.worst_seed) == (1.0, 10)
    assert (lower.worst, lower.worst_seed) == (3.0, 11)
    assert higher.value == 2.0
