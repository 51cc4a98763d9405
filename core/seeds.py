"""Seeds from disjoint streams, so that nothing is ever evaluated on the noise that it was fitted to.

PyTorch's CPU generator reads only the low 32 bits of a seed, so a stream lives in those: 3 bits say what the seed is
for, 29 bits count from a start that the user's seed chooses.
"""

from __future__ import annotations

import hashlib
from typing import Literal, get_args

SeedKind = Literal["calibration", "search", "evaluation", "effect", "recovery", "generate", "trials", "auto"]
COUNTER_BITS = 29


def seed_stream(kind: SeedKind, seed: int, count: int) -> tuple[int, ...]:
    """`count` different seeds below 2**32; two kinds never share one, whatever `seed` is.

    Args:
        kind: what the noise is for ("effect": the short comparison at the end of a pass).
        seed: the user's seed; another value starts elsewhere in the stream.
    """
    kinds = get_args(SeedKind)
    start = int.from_bytes(hashlib.sha256(f"{kind}/{seed}".encode()).digest()[:8], "big")
    return tuple((kinds.index(kind) << COUNTER_BITS) | ((start + index) % 2**COUNTER_BITS) for index in range(count))


def named_seed(seed: int, name: str) -> int:
    """Seed of one unit of work: resumed and distributed runs agree with plain ones."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")
