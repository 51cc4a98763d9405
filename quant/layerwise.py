"""Treat the layers of a unit one by one, each by its weight and what is known of its inputs: their second moments, and
of convolutions that may have factors the span of every channel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from ..core.config import Config
from ..core.errors import CalibrationError
from ..core.scheme import Scheme
from ..runtime.low_rank import along
from ..runtime.weight import QuantizedWeight, to_rows
from .block import Block, Treated
from .channel_factors import Spans, channel_factors
from .grams import Grams, has_grams
from .methods import rtn
from .smoothing import smoothed_gram

ROWS = 32768  # rows of x that one layer's statistics are taken from; more: steadier, slower
BASELINE = rtn.RTNConfig(search="mse")


@dataclass(frozen=True)
class Inputs:
    """What is known of the inputs of one layer."""

    gram: Tensor  # (K, K), E[x x^T]
    spans: Tensor | None  # of every channel of every image, see `Spans`; of layers that may have factors


@torch.no_grad()
def inputs_of(block: Block) -> dict[str, Inputs]:
    """Of the layers of a unit that multiply matrices and run in some call.

    Raises:
        CalibrationError: NaN or infinity enters a layer.
    """
    seeing = {name: layer for name, layer in block.layers.items() if has_grams(layer)}
    smooth = {name: layer for name, layer in seeing.items() if block.scheme(name).smooth}
    rows_per_call = max(1, ROWS // max(1, len(block.sightings)))
    with Grams(seeing, rows_per_call=rows_per_call) as grams, Spans(smooth) as spans:
        for sighting in block.sightings:
            block.run(sighting)
    found = {name: Inputs(gram, spans.of(name)) for name in seeing if (gram := grams.mean(name)) is not None}
    for name, inputs in found.items():
        check_finite(name, inputs.gram)
    return found


@torch.no_grad()
def treat_layers(block: Block, method: ModuleType, config: Config) -> dict[str, Treated]:
    """Every layer of a unit by a method of layers, or to nearest where that is no worse."""
    inputs = inputs_of(block) if "grams" in method.NEEDS else {}
    found = {}
    for name, layer in block.layers.items():
        weight: Tensor = layer.weight  # type: ignore[assignment]
        if "grams" in method.NEEDS:
            found[name] = _treat_layer(method, config, block.scheme(name), weight, inputs.get(name))
        else:
            found[name] = Treated(method.quantize(weight, block.scheme(name), config))
    return found


def _treat_layer(method: ModuleType, config: Config, scheme: Scheme, weight: Tensor, inputs: Inputs | None) -> Treated:
    """By the method, or to nearest where the method sees nothing or is no better on the inputs that it saw."""
    if inputs is None:
        return Treated(rtn.quantize(weight, scheme.plain, BASELINE), method="rtn")
    if inputs.spans is None:
        return _round_layer(method, config, scheme.plain, weight, inputs.gram)
    factors = channel_factors(weight, scheme, inputs.gram, inputs.spans)
    if factors is None:
        return _round_layer(method, config, scheme.plain, weight, inputs.gram)
    every = factors.repeat(len(inputs.gram) // len(factors))  # channels innermost
    moved = weight.float() * along(factors, weight, 1).float()
    treated = _round_layer(method, config, scheme.plain, moved, smoothed_gram(inputs.gram, every))
    return replace(treated, weight=replace(treated.weight, scheme=scheme, smoothing=factors))


def _round_layer(method: ModuleType, config: Config, scheme: Scheme, weight: Tensor, gram: Tensor) -> Treated:
    """By the method, or to nearest where that is no worse."""
    baseline = rtn.quantize(weight, scheme, BASELINE)
    error = output_error_of(weight, baseline, gram)
    found = method.quantize(weight, scheme, config, gram)
    if (better := output_error_of(weight, found, gram)) < error:
        return Treated(found, output_error=better)
    return Treated(baseline, method="rtn", output_error=error)


def check_finite(name: str, gram: Tensor) -> None:
    """Refuse statistics that mean nothing."""
    if not bool(gram.isfinite().all()):
        raise CalibrationError(
            f"what enters {name} holds NaN or infinity.",
            "The float network overflows on this calibration set.",
            "See whether the float pipeline makes images from the same inputs; calibrate with others.",
        )


def output_error_of(weight: Tensor, quantized: QuantizedWeight, gram: Tensor) -> float:
    """||(W - W^) x|| / ||W x|| over the inputs x behind a gram matrix (K, K)."""
    rows, difference = to_rows(weight).float(), to_rows(quantized.dequantize() - weight.float())
    power = ((rows @ gram) * rows).sum()
    return float((((difference @ gram) * difference).sum() / power.clamp(min=1e-30)).clamp(min=0).sqrt())


def weight_error_of(weight: Tensor, quantized: QuantizedWeight) -> float:
    """||W - W^|| / ||W||: the relative output error for white-noise inputs."""
    norm = float(weight.float().norm())
    return float((quantized.dequantize() - weight.float()).norm()) / norm if norm > 0 else 0.0
