"""SVDQuant: outliers move from the inputs into the weight, and out of it into a low-rank branch (Li et al., 2024, arXiv
2411.05007).

    W diag(s) = up down + R        y = Q(x / s) Q(R)^T + ((x / s) down^T) up^T + b

1. Smoothing: s is searched for among powers of the largest inputs and weights of each channel, one for all layers that
   read the same tensor. Candidates are judged by the outputs, with the branch, and weights and inputs rounded.
2. Low rank: up down is the leading part of W diag(s), then of W diag(s) - Q(R), as long as that helps.
3. R is rounded as GPTQ does it, for smoothed inputs.

Inputs below 8 bits that come from an activation function with a lower bound are shifted above 0 where that lowers the
error, so that none of their codes stands for a sign.

Letters: O rows, K input features, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from ...core.config import Config
from ...core.errors import ConfigError
from ...core.scheme import Scheme
from ...runtime.weight import QuantizedWeight
from ..assumed import assumed_inputs
from ..block import Treated
from ..entering import Entering
from ..layerwise import BASELINE
from ..smoothing import ALWAYS, smoothed_gram, smoothings
from ..take_apart import Layer, Parts, error_of, take_apart
from . import gptq, rtn

RANKS = (0, 8, 16, 32, 64)  # what `auto` chooses from
SCREENED = 256  # inputs that all candidates for s are judged on
FACTOR_BITS = 16  # of a number in a branch
# lower bounds of activation functions, as whole 128ths, so that bfloat16 holds them: ReLU, GELU, SiLU, Mish
SHIFTS = (0.0, 22 / 128, 36 / 128, 40 / 128)

NEEDS = ("grams",)
WITHOUT_DATA = "data_free"  # the field that lets it do without them
UNIT = "group"
ACT_MODE = "dynamic"
FORMATS = ("integer", "nvfp4")
FEW_BITS_ACT_MODE = "per-group"  # of fewer than 8


class SVDQuantConfig(Config):
    """Fields of `--set`."""

    rank: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"  # of the branch; larger: less error, larger file
    budget: float = Field(2.0, gt=0)  # auto: a branch has at most so many bits for each weight of its layers
    steps: int = Field(10, ge=2, le=100)  # of alpha; more: better smoothing, slower
    finalists: int = Field(3, ge=1)  # candidates that are judged on all inputs; more: surer, slower
    refinements: int = Field(3, ge=0, le=10)  # of the branch in turn with the rounding; more: less error, slower
    gptq: bool = True  # false: residuals, and layers without a branch, are rounded to nearest
    joint: bool = True  # false: factors are judged as if there were no branch; quicker, more error
    shift: bool = True  # false: inputs behind a GELU or the like have signed integers as all others
    data_free: bool = False  # true: only weights are looked at; quicker, little memory, more error


CONFIG = SVDQuantConfig


def check(config: SVDQuantConfig, act_bits: int, act_mode: str) -> None:
    """Refuse fixed activation scales.

    Raises:
        ConfigError: they are asked for.
    """
    if act_mode in ("static", "per-step"):
        raise ConfigError(
            f"svdquant has no {act_mode} activation scales.",
            "It judges its smoothing on inputs that are rounded token by token.",
            "Leave --act-mode out.",
        )


def planned_rank(config: SVDQuantConfig) -> int:
    """Rank of the branches as far as it is known before a weight is read."""
    return 0 if config.rank == "auto" else config.rank


def smooths(config: SVDQuantConfig) -> bool:
    """Whether convolutions have factors for the channels of what enters them: only where that is known."""
    return not config.data_free


def quantize(weight: Tensor, scheme: Scheme, config: SVDQuantConfig, gram: Tensor | None = None) -> QuantizedWeight:
    """A layer without smoothing and branch: a convolution, or one that sees the time step alone."""
    if config.gptq and gram is not None:
        return gptq.quantize(weight, scheme, gptq.GPTQConfig(), gram)
    return rtn.quantize(weight, scheme, BASELINE)


def quantize_group(
    weights: Mapping[str, Tensor], schemes: Mapping[str, Scheme], entering: Entering, config: SVDQuantConfig, seed: int
) -> dict[str, Treated]:
    """Quantize linears that read the same tensor.

    Args:
        weights: (O, K) each, any float dtype.
        schemes: as planned; rank and smoothing are decided here.
    """
    layers: Mapping[str, Layer] = {
        name: Layer.reading(entering.rows, weight, schemes[name]) for name, weight in weights.items()
    }
    if config.shift:
        layers = shifted_where_better(layers, entering.lowest)
    rank, smoothing = choose(list(layers.values()), entering.absmax, config, seed)
    found = {}
    for name, layer in layers.items():
        parts, error = refined(layer, smoothing, rank, config.refinements, seed)
        found[name] = _rounded(layer, parts, error, entering.gram, config)
    return found


def _may_shift(scheme: Scheme) -> bool:
    """Whether integers without a sign would be more than those that the scheme has."""
    return scheme.act_bits < 8 and scheme.split is None and not scheme.act_offset


def shifted_where_better(layers: Mapping[str, Layer], lowest: float) -> Mapping[str, Layer]:
    """The layers with the least shift that lifts all inputs above 0, or as they are where signed integers do better.

    Args:
        lowest: of all inputs.
    """
    schemes = [layer.scheme for layer in layers.values()]
    shift = next((bound for bound in SHIFTS if bound >= -lowest), None)
    if shift is None or not all(_may_shift(scheme) for scheme in schemes):
        return layers
    moved = {name: layer.shifted(shift) for name, layer in layers.items()}

    def error(which: Mapping[str, Layer]) -> float:
        return _mean_error(list(which.values()), lambda layer: take_apart(layer, None, 0, 0, rough=True).unrounded())

    return moved if error(moved) < error(layers) else layers


def quantize_alone(weight: Tensor, scheme: Scheme, config: SVDQuantConfig, seed: int) -> Treated:
    """Quantize a linear of which nothing is known but its weight (O, K): its factors are those that only look at the
    weight, or none; rank and factors are judged on assumed inputs, and the residual is rounded to nearest."""
    alone = config.model_copy(update={"steps": 1, "gptq": False, "refinements": min(config.refinements, 1)})
    found = quantize_group({"": weight}, {"": scheme}, assumed_inputs(weight, seed), alone, seed)[""]
    return replace(found, output_error=None)  # assumed inputs measure nothing


def choose(layers: Sequence[Layer], absmax: Tensor, config: SVDQuantConfig, seed: int) -> tuple[int, Tensor | None]:
    """Rank and smoothing of a group. With `auto` a branch must do more than the same bytes would do in the codes."""
    if config.rank != "auto":
        return config.rank, smoothing_beside(layers, absmax, config.rank, config, seed)[0]
    ranks = [rank for rank in RANKS if branch_bits(layers, rank) <= config.budget]
    found = {rank: smoothing_beside(layers, absmax, rank, config, seed) for rank in ranks}
    smoothing, error = found[0]
    of_inputs = _mean_error(layers, lambda layer: take_apart(layer, smoothing, 0, seed, rough=True).unrounded())

    def left(rank: int) -> float:
        """Share of the error that finer codes would leave: a bit more takes three quarters of what is not of inputs."""
        finer = of_inputs + (error - of_inputs) * 4 ** -branch_bits(layers, rank)
        return found[rank][1] / max(finer, 1e-30)

    best = min(ranks, key=left)
    return best, found[best][0]


def branch_bits(layers: Sequence[Layer], rank: int) -> float:
    """Bits of the branches of a group for each of its weights."""
    numbers = sum(min(rank, *layer.rows.shape) * sum(layer.rows.shape) for layer in layers)
    return FACTOR_BITS * numbers / sum(layer.rows.numel() for layer in layers)


def smoothing_beside(
    layers: Sequence[Layer], absmax: Tensor, rank: int, config: SVDQuantConfig, seed: int
) -> tuple[Tensor | None, float]:
    """The smoothing for a branch of this rank, and the error with both."""
    if config.joint or not rank:
        return find_smoothing(layers, absmax, rank, config, seed)
    smoothing, _ = find_smoothing(layers, absmax, 0, config, seed)
    return smoothing, _mean_error(layers, lambda layer: take_apart(layer, smoothing, rank, seed))


def find_smoothing(
    layers: Sequence[Layer], absmax: Tensor, rank: int, config: SVDQuantConfig, seed: int
) -> tuple[Tensor | None, float]:
    """The candidate with the least error, and this error. All are screened on few inputs; the best are compared on all,
    beside no smoothing and the data-free one."""
    candidates = smoothings(absmax, [layer.rows for layer in layers], config.steps)
    few = [layer.first(SCREENED) for layer in layers]

    def error(place: int, judges: Sequence[Layer], *, rough: bool) -> float:
        return _mean_error(judges, lambda layer: take_apart(layer, candidates[place], rank, seed, rough=rough))

    screened = sorted(range(ALWAYS, len(candidates)), key=lambda place: error(place, few, rough=True))
    finalists = [*range(ALWAYS), *screened[: config.finalists]]
    errors = {place: error(place, layers, rough=config.data_free) for place in finalists}
    best = min(finalists, key=errors.__getitem__)
    return candidates[best], errors[best]


def _mean_error(layers: Sequence[Layer], make: Callable[[Layer], Parts]) -> float:
    return sum(error_of(layer, make(layer)) for layer in layers) / len(layers)


def refined(layer: Layer, smoothing: Tensor | None, rank: int, refinements: int, seed: int) -> tuple[Parts, float]:
    """The parts of a branch that makes up for the rounding of the residual before it, until that helps no more, and the
    error with them."""
    best = take_apart(layer, smoothing, rank, seed)
    least = error_of(layer, best)
    for _ in range(refinements if rank else 0):
        parts = take_apart(layer, smoothing, rank, seed, given=best.rounded)
        if (error := error_of(layer, parts)) >= least:
            break
        best, least = parts, error
    return best, least


def _rounded(layer: Layer, parts: Parts, error: float, gram: Tensor, config: SVDQuantConfig) -> Treated:
    """The residual rounded as well as it can be, or the whole weight to nearest where that is no worse.

    Args:
        error: with the residual rounded to nearest.
    """
    whole = take_apart(layer, None, 0, 0)
    codes = parts.grid.nearest(parts.residual)
    least = error_of(layer, whole)
    if config.gptq:
        moved, _ = gptq.round_columns(
            parts.residual, smoothed_gram(gram, parts.smoothing), parts.grid, gptq.GPTQConfig()
        )
        if (found := error_of(layer, parts.with_codes(moved))) < error:
            codes, error = moved, found
    if error < least:
        return Treated(parts.pack(codes), output_error=error**0.5)
    return Treated(whole.pack(whole.grid.nearest(layer.rows)), method="rtn", output_error=least**0.5)
