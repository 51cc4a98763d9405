"""Faster Diffusion: Rethinking the Role of the UNet Encoder in Diffusion Models (2024), arXiv 2312.09608: at key calls
a UNet computes everything; at the others its up blocks alone run, on what first convolution, down blocks and middle
gave at the key call before.

scaled      K key calls that lie as densely at the start as those of the paper, for any C
paper       its 9 key calls of 50, as they are
interval    0, N, 2N, ... with the smallest whole N that gives no more than K calls

What a call gives that reuses does not depend on its noisy sample, so several calls in a row can be decoded as one batch
(the paper's parallel processing): `runtime/decode_ahead.py`. Its noise injection: `runtime/prior_noise.py`.
Letters: C calls of a run, K calls that compute.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ...core.cache_plan import MOST_NOISE
from ...core.config import Config
from ...core.errors import ConfigError

PAPER = (0, 1, 2, 3, 5, 10, 15, 25, 35)  # of Stable Diffusion with 50 DDIM calls
PAPER_CALLS = 50


class EncoderConfig(Config):
    """Fields of `--set`."""

    form: Literal["scaled", "paper", "interval"] = "scaled"  # where the key calls stand
    ahead: int = Field(1, ge=1)  # calls that are decoded as one batch; larger: fewer launches, more memory
    prior_noise: float = Field(0.0, ge=0, le=MOST_NOISE)  # of the first sample, added again before late steps; the
    # paper has 0.003. More: more detail, less like the run without a plan


CONFIG = EncoderConfig
NEEDS: tuple[str, ...] = ()
UNIT = "encoder"


def schedule(calls: int, computed: int, config: EncoderConfig) -> tuple[int, ...]:
    """The calls that compute, ascending, the first of them 0.

    Args:
        calls: C.
        computed: K, `least` to C; `interval` and `paper` may give fewer.

    Raises:
        ConfigError: the form `paper` for other than 50 calls.
    """
    if config.form == "interval":
        return tuple(range(0, calls, -(-calls // computed)))
    if config.form == "scaled":
        return _scaled(calls, computed)
    if calls != PAPER_CALLS:
        raise ConfigError(
            f"the key calls of the paper are {len(PAPER)} of {PAPER_CALLS}; this run has {calls}.",
            mend="Leave --set form=paper out: scaled places any number among any.",
        )
    return PAPER


def least(calls: int, config: EncoderConfig) -> int:
    """How many calls compute in any plan."""
    return len(PAPER) if config.form == "paper" and calls == PAPER_CALLS else 1


def decode_ahead(config: EncoderConfig) -> int:
    """How many calls that reuse are decoded as one batch."""
    return config.ahead


def prior_noise(config: EncoderConfig) -> float:
    """The share of the first sample that is added again before late steps."""
    return config.prior_noise


def _scaled(calls: int, computed: int) -> tuple[int, ...]:
    """Key call j stands where the share j / K of the paper's key calls lies before; no two in one place."""
    found: list[int] = []
    for number in range(computed):
        place = int(_quantile(number / computed) * calls + 1e-9)
        earliest = found[-1] + 1 if found else 0
        found.append(min(max(place, earliest), calls - computed + number))
    return tuple(found)


def _quantile(share: float) -> float:
    """Where in a run of length 1 a share of the paper's key calls has passed, linear between them."""
    points = (*PAPER, PAPER_CALLS)
    number = min(int(share * len(PAPER) + 1e-9), len(PAPER) - 1)
    inside = share * len(PAPER) - number
    return (points[number] + inside * (points[number + 1] - points[number])) / PAPER_CALLS
