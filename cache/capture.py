"""Runs that compute everything, held call by call, and what units give in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..core.reporter import Reporter
from ..runtime.cache_hooks import Values
from ..runtime.cached import CachedUnits
from ..runtime.request import RunRequest
from ..runtime.trajectory import DenoiserCall, capture_calls


def capture_batches(
    pipe: Any, component: str, request: RunRequest, reporter: Reporter, title: str
) -> Iterator[tuple[float, list[list[DenoiserCall]]]]:
    """Batch after batch of samples their share of all and the evaluations of every call of their run."""
    for positions in reporter.progress(list(request.batches()), title):
        yield len(positions) / len(request.seeds), capture(pipe, component, request, positions)


def capture(pipe: Any, component: str, request: RunRequest, positions: Sequence[int]) -> list[list[DenoiserCall]]:
    """The evaluations of every call of a run of some samples, in one batch."""
    calls: dict[int, list[DenoiserCall]] = {}
    for call in capture_calls(pipe, request, components=[component], positions=positions):
        if call.state is not None:
            calls.setdefault(call.state.call, []).append(call)
    return [calls[call] for call in sorted(calls)]


def record(units: CachedUnits, evaluations: list[DenoiserCall]) -> list[Values]:
    """What the units give at one call, a table for each evaluation."""
    found: list[Values] = []
    for call in evaluations:
        values: Values = {}
        with units.recording(values):
            call.replay(units.denoiser)
        found.append(values)
    return found
