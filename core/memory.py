"""Memory that was freed goes back to the system.

The allocator of glibc keeps what lies between blocks that are still in use, and hardly uses it again for the aligned
blocks that torch asks for: a network treated part by part, of each of which a few tensors stay, grew by 0.3 GB a part
(PixArt-XL, 28 parts; what was in use grew by 0.02 GB).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache


def give_back_memory() -> None:
    """Return all freed pages; milliseconds. Nothing where the C library is another one than glibc."""
    if trim := _trimmer():
        trim(0)


@cache
def _trimmer() -> Callable[[int], int] | None:
    found: Callable[[int], int] | None = None
    if sys.platform == "linux":
        found = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found
