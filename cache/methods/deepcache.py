"""DeepCache: Accelerating Diffusion Models for Free (2024), arXiv 2312.00858: calls that compute everything stand at
fixed places, whatever the model does there.

even        floor(i C / K), i = 0 ... K - 1
interval    0, N, 2N, ... with the smallest whole N that gives no more than K calls
paper       with S(x, q) = sign(x) |x|^q: K points l_i at equal distances on [S(-c, 1/p), S(C - c, 1/p)), then the whole
            numbers S(l_i, p) + c; dense around call c. Points that fall together are one
code        as the authors' program has it: powers of negative numbers are complex and their real part counts, the first
            point becomes 0, the last is left out, and p is lowered until K different ones are left

Letters: C calls of a run, K calls that compute, c center, p power.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ...core.config import Config
from ...core.errors import ConfigError

LOWERED_BY = 0.02  # p, step by step, in the form "code"


class DeepCacheConfig(Config):
    """Fields of `--set`."""

    form: Literal["even", "interval", "paper", "code"] = "even"  # where the computed calls stand
    center: float = Field(15.0, ge=0)  # for paper and code: the call around which they are dense
    power: float = Field(1.4, ge=1)  # for paper and code: larger: denser there


CONFIG = DeepCacheConfig
NEEDS: tuple[str, ...] = ()


def schedule(calls: int, computed: int, config: DeepCacheConfig) -> tuple[int, ...]:
    """The calls that compute, ascending, the first of them 0.

    Args:
        calls: C.
        computed: K, at most C; `interval` and `paper` may give fewer.

    Raises:
        ConfigError: the form `code` finds no power that gives so many calls.
    """
    if config.form == "even":
        return tuple(place * calls // computed for place in range(computed))
    if config.form == "interval":
        return tuple(range(0, calls, -(-calls // computed)))
    if config.form == "paper":
        return _power_law(calls, computed, config.center, config.power)
    return _power_law_as_coded(calls, computed, config.center, config.power)


def _power_law(calls: int, computed: int, center: float, power: float) -> tuple[int, ...]:
    low, high = _signed_power(-center, 1 / power), _signed_power(calls - center, 1 / power)
    points = (low + (high - low) * place / computed for place in range(computed))
    found = {int(_signed_power(point, power) + center + 1e-9) for point in points}
    return tuple(sorted({0, *(min(max(place, 0), calls - 1) for place in found)}))


def _power_law_as_coded(calls: int, computed: int, center: float, power: float) -> tuple[int, ...]:
    while power > 1:
        low, high = complex(-center) ** (1 / power), complex(calls - center) ** (1 / power)
        points = [low + (high - low) * place / computed for place in range(computed + 1)]
        places = sorted({int((point**power).real) for point in points})
        found = (0, *(int(place + center) for place in places[1:-1]))
        if len(found) == computed and list(found) == sorted(set(found)):
            return found
        power -= LOWERED_BY
    raise ConfigError(
        f"the power law as coded gives no {computed} of {calls} calls around call {center:g}.",
        mend="Choose another --set center=N, or --set form=paper.",
    )


def _signed_power(value: float, power: float) -> float:
    return abs(value) ** power * (1 if value >= 0 else -1)
