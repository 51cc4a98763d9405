"""Wall-clock time of several actions, measured in turns so that a busy machine disturbs all of them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..core.reporter import Reporter, silent


def now(device: torch.device | None = None) -> float:
    """The clock in seconds, read when an accelerator has done all that it was told to.

    Args:
        device: where the work is; None: the current accelerator, if there is one.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and (device is None or device.type == accelerator.type):
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def measure_in_turns(
    actions: Sequence[Callable[[], Any]],
    repeats: int,
    reporter: Reporter | None = None,
    *,
    device: torch.device | None = None,
) -> list[list[float]]:
    """Seconds of every action (outer list) in every repeat (inner list), after one warm-up of each.

    Args:
        device: where the actions work, see `now`.
    """
    for action in actions:
        action()
    seconds: list[list[float]] = [[] for _ in actions]
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for repeat in (reporter or silent()).progress(range(repeats), "timing"):
            for turn in range(len(actions)):
                index = (turn + repeat) % len(actions)
                started = now(device)
                actions[index]()
                seconds[index].append(now(device) - started)
    finally:
        if collecting:
            gc.enable()
    return seconds
