"""How many calls may compute everything for a run to cost what was asked for. Imports no torch."""

from __future__ import annotations

from math import ceil, floor

from ..core.errors import UnsupportedError


def computed_calls(calls: int, ratio: float, partial: float, *, wish: str, least: int = 1) -> int:
    """The most of `calls` that may compute everything, in a run that is to cost `ratio` of the full one.

    Args:
        ratio: what the run may cost, 1 for the full one.
        partial: what a call costs that skips the unit, 1 for a full one.
        wish: what was asked for, for the message; the best that can be reached is named in the same measure.
        least: so many calls compute whatever is asked for.

    Raises:
        UnsupportedError: these are too many.
    """
    found = int(calls * (ratio - partial) / (1 - partial) + 1e-9) if partial < min(ratio, 1) else 0
    if found < least:
        cheapest = (least + (calls - least) * min(partial, 1.0)) / calls
        more = f", and at least {least} calls compute" if least > 1 else ""
        share = f"{partial:.3f} of a full one"
        raise UnsupportedError(
            f"this unit cannot give {asked(wish, ratio)}: a call that skips it costs {share}{more}.",
            *advice(calls, cheapest, wish=wish),
        )
    return min(found, calls)


def advice(calls: int, cheapest: float, *, wish: str) -> tuple[str, str]:
    """Why a target is out of reach, and how to mend that.

    Args:
        cheapest: what the cheapest run costs, 1 for a full one.
    """
    best = floor(100 / cheapest) / 100 if wish == "speedup" else ceil(1000 * cheapest) / 1000
    if best == 1:  # no target that can be asked for
        return f"With {calls} calls it saves nothing.", "Choose a larger part with --unit, or another --method."
    option = f"--speedup {best:.2f}" if wish == "speedup" else f"--macs-ratio {best:.3f}"
    return (
        f"The best that can be reached with {calls} calls is {option}.",
        "Ask for less, or choose a larger part with --unit.",
    )


def asked(wish: str, ratio: float) -> str:
    """The target in words."""
    return f"a speed-up of {1 / ratio:g}" if wish == "speedup" else f"a MAC ratio of {ratio:g}"
