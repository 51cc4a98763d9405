"""Wall-clock time of several actions, measured in turns so that a busy machine disturbs all of them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..core.reporter import Reporter, silent


def measure_in_turns(
    actions: Sequence[Callable[[], Any]], repeats: int, reporter: Reporter | None = None
) -> list[list[float]]:
    """Seconds of every action (outer list) in every repeat (inner list), after one warm-up of each."""
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
                _finish()
                started = time.perf_counter()
                actions[index]()
                _finish()
                seconds[index].append(time.perf_counter() - started)
    finally:
        if collecting:
            gc.enable()
    return seconds


def _finish() -> None:
    """Wait for what an accelerator was given to do: it runs behind the program."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
