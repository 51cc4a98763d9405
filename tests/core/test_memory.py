import sys

import psutil
import pytest

from dacc.core import memory
from dacc.core.memory import give_back_memory

MB = 1 << 20


@pytest.mark.skipif(memory._trimmer() is None, reason="another C library than glibc")
def test_what_lies_between_blocks_in_use_is_given_back():
    process = psutil.Process()
    blocks = [bytearray(b"x") * (64 << 10) for _ in range(3000)]  # 188 MB, each too small for a mapping of its own
    full = process.memory_info().rss
    kept = blocks[::100]
    blocks.clear()
    give_back_memory()
    assert full - process.memory_info().rss > 150 * MB
    assert all(block[-1] == ord("x") for block in kept)


def test_other_c_libraries_are_let_be(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    memory._trimmer.cache_clear()
    assert memory._trimmer() is None
    give_back_memory()
    monkeypatch.undo()
    memory._trimmer.cache_clear()
