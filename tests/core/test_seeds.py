from typing import get_args

import pytest

from dacc.core.seeds import SeedKind, named_seed, seed_stream


def test_streams_of_different_kinds_never_meet() -> None:
    streams = [set(seed_stream(kind, seed, 5000)) for kind in get_args(SeedKind) for seed in (0,)]
    assert sum(map(len, streams)) == len(set.union(*streams))


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_a_stream_is_repeatable_distinct_and_fits_the_cpu_generator(seed: int) -> None:
    stream = seed_stream("evaluation", seed, 1000)
    assert stream == seed_stream("evaluation", seed, 2000)[:1000]
    assert len(set(stream)) == 1000
    assert all(0 <= value < 2**32 for value in stream)


def test_another_seed_gives_another_stream() -> None:
    assert not set(seed_stream("search", 0, 1000)) & set(seed_stream("search", 1, 1000))


def test_every_unit_of_work_has_a_seed_of_its_own_that_follows_the_user_s() -> None:
    names = [f"down_blocks.{number}.resnets.0" for number in range(1000)]
    found = [named_seed(seed, name) for seed in (0, 1) for name in names]
    assert len(set(found)) == len(found)
    assert found == [named_seed(seed, name) for seed in (0, 1) for name in names]
    assert all(0 <= value < 2**32 for value in found)
    assert named_seed(0, "temporal") == 0xC556B9A2  # part of what makes equal bytes: never to be changed
