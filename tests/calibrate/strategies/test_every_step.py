from random import Random

from dacc.calibrate.strategies.every_step import CONFIG, kept_calls


def test_every_call_of_every_sample_is_kept() -> None:
    assert kept_calls(5, 3, CONFIG(), Random(0)) == [(0, 1, 2, 3, 4)] * 3
