"""Where to compute when the calls between are forecast: of all ways to place K calls the cheapest, exactly, by a
dynamic programme over the last m + 1 computed calls, which are what a forecast of order m looks at.

    M(k, h) = min over n of M(k - 1, h') + D(h', n),    D(h', n) = sum over t between h' and n of cost(h', t)

with h' the calls that were last before n and h those with n in place of the oldest. This is the grouping of CacheQuant
(2025), arXiv 2503.01323, with forecasts (TaylorSeer, 2025, arXiv 2503.06923) in place of reuse; order 0 is that.

Letters: C calls of a run, K calls that compute, m order.
"""

from __future__ import annotations

from collections.abc import Callable

from ..core.errors import ConfigError

History = tuple[int, ...]  # calls that computed, ascending, the m + 1 last ones
Cost = Callable[[History, int], float]  # of forecasting a call from these


def place_calls(calls: int, computed: int, order: int, cost: Cost, *, warmup: int = 1, longest: int) -> tuple[int, ...]:
    """The calls that compute, ascending, 0 ... `warmup` - 1 among them.

    Args:
        calls: C.
        computed: K, `warmup` to C.
        order: m.
        longest: most calls from one that computes to the next, that one included.

    Raises:
        ConfigError: distances of `longest` do not reach the end of the run.
    """
    segments = _Segments(calls, cost, longest)
    start = tuple(range(warmup))
    layer = {start[-order - 1 :]: (0.0, start)}
    for _ in range(computed - warmup):
        layer = _next_layer(layer, segments, order)
    ends = [
        (total + segments.of(history)[calls - history[-1] - 1], places)
        for history, (total, places) in layer.items()
        if calls - history[-1] <= longest
    ]
    if not ends:
        raise ConfigError(
            f"{computed} of {calls} calls at distances of at most {longest} do not reach the end of the run.",
            mend="Ask for less speed.",
        )
    return min(ends)[1]


class _Segments:
    """D(h, n), summed up once for each history."""

    def __init__(self, calls: int, cost: Cost, longest: int) -> None:
        self.calls, self._cost, self._longest = calls, cost, longest
        self._known: dict[History, list[float]] = {}

    def of(self, history: History) -> list[float]:
        """For the calls behind the last of a history, as far as may be: what all before each of them cost."""
        if history not in self._known:
            sums, last = [0.0], history[-1]
            for call in range(last + 1, min(last + self._longest, self.calls)):
                sums.append(sums[-1] + self._cost(history, call))
            self._known[history] = sums
        return self._known[history]


Layer = dict[History, tuple[float, tuple[int, ...]]]  # history -> the least cost up to it, and the calls that give it


def _next_layer(layer: Layer, segments: _Segments, order: int) -> Layer:
    """All histories with one more call that computes."""
    found: Layer = {}
    for history, (total, places) in layer.items():
        for ahead, cost in enumerate(segments.of(history)):
            following = history[-1] + 1 + ahead
            if following >= segments.calls:
                break
            longer = (*history, following)[-order - 1 :]
            if longer not in found or total + cost < found[longer][0]:
                found[longer] = total + cost, (*places, following)
    return found
