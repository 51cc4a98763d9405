"""From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers (2025), arXiv 2503.06923: some calls
compute everything; between them what is skipped is forecast from the last computed ones. Published are calls at fixed
distances; here they are searched for, unless those are asked for.

searched    0 ... w - 1, then where the forecasts between do least to the final sample, see `cache/placing.py`; whole
            runs choose the order of the forecasts, whether they are fitted (`cache/fitting.py`), and move calls, see
            `cache/moving.py`
even        0 ... w - 1, then w - 1 + floor(i (C - w + 1) / (K - w + 1)), i = 1 ... K - w
interval    0 ... w - 1, then w - 1 + N, w - 1 + 2 N, ... with the smallest whole N that gives no more than K calls

Published for the output of every attention and feed-forward of a transformer; here for one unit. Unless another is
named that is what the whole denoiser returns: it changes more evenly from call to call than what is inside, and a call
that forecasts it computes nothing. How values are continued: `runtime/forecast.py`.
Letters: C calls of a run, K calls that compute, w warmup.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ...core.cache_plan import Abscissa, Predictor
from ...core.config import Config
from ..fitting import RIDGES
from ..forecast_cost import ForecastCost
from ..moving import Choice
from ..placing import Cost, place_calls

SEARCHED_ORDERS = (1, 2, 3)


class TaylorConfig(Config):
    """Fields of `--set`."""

    order: int | None = Field(None, ge=1, le=6)  # of the polynomial; larger: follows bends, and carries noise further.
    # None: searched tries 1, 2 and 3; the others take 2
    form: Literal["newton", "published"] = "newton"  # exact for polynomials, or the recurrence of the paper
    x: Abscissa = "call"  # what the polynomial runs over
    warmup: int = Field(1, ge=1)  # calls at the start that all compute
    spacing: Literal["searched", "even", "interval"] = "searched"  # of the others: the K whose forecasts cost least in
    # profiled runs, K in all, or every N-th as published
    trials: int = Field(40, ge=0)  # for searched: whole runs with other orders and calls; more: better, longer
    correct: bool = True  # for trials: also forecasts that are fitted to the profiled runs, per call and channel
    joint: bool = True  # on a quantized source: all this against the float pipeline

    @model_validator(mode="after")
    def _check_order(self) -> TaylorConfig:
        if self.spacing == "searched" and self.order not in (None, *SEARCHED_ORDERS):
            raise ValueError(f"spacing=searched places forecasts of order 1 to 3, not {self.order}; even knows all")
        return self


CONFIG = TaylorConfig
ORDER = 2  # where none is asked for and none is searched
REACH = 3  # distances are searched up to so many times their mean


def needs(config: TaylorConfig) -> tuple[str, ...]:
    """What a schedule is found from."""
    return ("forecasts",) if config.spacing == "searched" else ()


def best_units(bits: int) -> tuple[str, ...]:
    """What is treated unless it is named: the first of these that a denoiser has. Measured nearest was the output, of
    networks with 4-bit weights the body, whose many channels leave more to the fits.

    Args:
        bits: the fewest that a weight of the denoiser has.
    """
    return ("body", "output") if bits < 8 else ("output",)


def least(calls: int, config: TaylorConfig) -> int:
    """How many calls compute in any plan."""
    return min(config.warmup, calls)


def schedule(calls: int, computed: int, config: TaylorConfig, cost: Cost | None = None) -> tuple[int, ...]:
    """The calls that compute, ascending, the first of them 0.

    Args:
        calls: C.
        computed: K, `least` to C; `interval` may give fewer.
        cost: of forecasting a call from the computed ones before, for `searched`.

    Raises:
        ConfigError: see `place_calls`.
    """
    if cost is not None:
        longest = REACH * -(-calls // computed)
        return place_calls(calls, computed, config.order or ORDER, cost, warmup=config.warmup, longest=longest)
    last, later = config.warmup - 1, computed - config.warmup  # of the warm-up; calls to place behind it
    if config.spacing == "even":
        places = [last + number * (calls - last) // (later + 1) for number in range(1, later + 1)]
    else:
        interval = -(-(calls - last) // (later + 1))
        places = list(range(last + interval, calls, interval))
    return (*range(config.warmup), *places)


def candidates(calls: int, computed: int, config: TaylorConfig, cost: ForecastCost) -> list[Choice]:
    """What whole runs choose from: for each order the placement that is cheapest, and equal distances; where forecasts
    may be fitted, these with fits, and in place of the first what is cheapest with one.

    Arguments as for `schedule`.
    """
    found, fitted = list[Choice](), cost.fitted
    for order in SEARCHED_ORDERS if config.order is None else (config.order,):
        own = config.model_copy(update={"order": order})
        even = schedule(calls, computed, own.model_copy(update={"spacing": "even"}))
        found += [Choice(own, schedule(calls, computed, own, cost)), Choice(own, even)]
        if fitted is not None:
            places = schedule(calls, computed, own, fitted)
            found += [Choice(own, where, ridge) for ridge in RIDGES for where in (places, even)]
    return found


def predictor(config: TaylorConfig) -> Predictor:
    """How the calls between are forecast."""
    return Predictor(order=config.order or ORDER, form=config.form, x=config.x)
