"""Quantized arithmetic in float, for the float network of a calibrated method: weights are replaced in place, and
activations are rounded on their way into a layer exactly as the integer kernels round them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.scheme import Scheme
from ..runtime.kernels_int8 import quantize_rows
from ..runtime.weight import QuantizedWeight


class RoundedInputs:
    """Rounds what enters the layers of one model, for those that are switched on."""

    def __init__(self, model: nn.Module, schemes: dict[str, Scheme]) -> None:
        self._on: set[str] = set()
        for name, scheme in schemes.items():
            if scheme.act_bits < 16:  # hooked now: a call that stands still in front of a layer sees no later hook
                model.get_submodule(name).register_forward_pre_hook(self._round(name, scheme))

    def switch_on(self, name: str) -> None:
        self._on.add(name)

    def _round(self, name: str, scheme: Scheme) -> Any:
        qmax = 2 ** (scheme.act_bits - 1) - 1

        def round_input(layer: nn.Module, args: tuple[Any, ...]) -> Any:
            if name not in self._on:
                return None
            return (round_dynamic(args[0], qmax, per_sample=isinstance(layer, nn.Conv2d)), *args[1:])

        return round_input


def round_dynamic(x: Tensor, qmax: int, *, per_sample: bool) -> Tensor:
    """x through its integers: one scale per token (..., K), or per sample (N, C, H, W)."""
    rows = x.flatten(1) if per_sample else x.flatten(0, -2)
    integers, scale = quantize_rows(rows, qmax)
    return (integers.float() * scale).view(x.shape).to(x.dtype)


@torch.no_grad()
def put_weight_(layer: nn.Module, weight: QuantizedWeight) -> None:
    """Let a float layer compute with the values of a quantized weight."""
    own: Tensor = layer.weight  # type: ignore[assignment]
    own.copy_(weight.dequantize(own.dtype))
