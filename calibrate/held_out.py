"""Which calls of a calibration set are learned from, and which judge what was learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from ..core.errors import CalibrationError

Item = TypeVar("Item")
HELD_OUT = 10  # of so many calls one is not trained on, but judges


def split_calls(items: Sequence[Item], places: Sequence[int]) -> tuple[list[Item], list[Item]]:
    """Calls to learn from, and every tenth to judge by: in each round over the grid other places.

    Args:
        items: the calls, in the order of the set.
        places: where on the grid each of them is.

    Raises:
        CalibrationError: fewer than two calls.
    """
    if len(items) < 2:
        raise CalibrationError(
            f"{len(items)} denoiser call is too little to train on.",
            "One part of the calls is learned from, another one judges.",
            "Calibrate with more --samples or --steps.",
        )
    rounds: dict[int, int] = {}
    learned: list[Item] = []
    judged: list[Item] = []
    for item, place in zip(items, places, strict=True):
        rounds[place] = turn = rounds.get(place, -1) + 1
        # 3 and 10 have no common factor: ten rounds judge every place once
        (judged if (place + 3 * turn) % HELD_OUT == HELD_OUT // 2 else learned).append(item)
    return (learned, judged) if learned and judged else (list(items[1:]), [items[0]])
