"""How many calls may compute everything for a run to cost what was asked for. Imports no torch."""

from __future__ import annotations

from math import ceil, floor

from ..core.errors import UnsupportedError


def computed_calls(calls: int, ratio: float, partial: float, *, wish: str) -> int:
    """The most of `calls` that may compute everything, in a run that is to cost `ratio` of the full one.

    Args:
        ratio: what the run may cost, 1 for the full one.
        partial: what a call costs that skips the unit, 1 for a full one.
        wish: what was asked for, for the message; the best that can be reached is named in the same measure.

    Raises:
        UnsupportedError: even one computed call is too much.
    """
    found = int(calls * (ratio - partial) / (1 - partial) + 1e-9) if partial < min(ratio, 1) else 0
    if found < 1:
        cheapest = (1 + (calls - 1) * min(partial, 1.0)) / calls
        best = f"--speedup {floor(100 / cheapest) / 100:.2f}"
        if wish != "speedup":
            best = f"--macs-ratio {ceil(1000 * cheapest) / 1000:.3f}"
        raise UnsupportedError(
            f"this unit cannot give {_asked(wish, ratio)}: a call that skips it costs {partial:.3f} of a full one.",
            f"The best that it can reach with {calls} calls is {best}.",
            "Ask for less, or choose a larger part with --unit.",
        )
    return min(found, calls)


def _asked(wish: str, ratio: float) -> str:
    return f"a speed-up of {1 / ratio:g}" if wish == "speedup" else f"a MAC ratio of {ratio:g}"
