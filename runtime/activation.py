"""Fixed scales of what enters a layer, and how they round it.

    q = clamp(round(x * (1 / scale)) + zero_point, 0, 2**bits - 1) - 2**(bits - 1)        an int8 value
    x = scale * (q - z),   z = zero_point - 2**(bits - 1)

Letters: P parts of input channels with scales of their own (two in a split layer, else one); S rows of a table: one
when the scales are the same in every denoiser call, else one for each call and a last one that fits all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.scheme import Scheme

ACTIVATION_NAMES = ("act_scale", "act_zero_point")


@dataclass(frozen=True)
class ActivationScale:
    """Fixed scales of what enters a layer."""

    scale: Tensor  # (S, P) float32 > 0
    zero_point: Tensor  # (S, P) uint8, 0..2**bits - 1

    def to(self, device: torch.device) -> ActivationScale:
        """The same there."""
        return ActivationScale(self.scale.to(device), self.zero_point.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to store, by their state-dict names."""
        return {"act_scale": self.scale, "act_zero_point": self.zero_point}


def activation_shapes(scheme: Scheme) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
    """Shapes and dtypes of the stored tensors; empty for schemes without fixed scales."""
    if not scheme.has_fixed_acts:
        return {}
    shape = ((scheme.act_steps or 0) + 1, scheme.parts)
    return {"act_scale": (shape, torch.float32), "act_zero_point": (shape, torch.uint8)}


def quantize_static(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Integers int8 of any `x` against one scale () float32 and zero point () uint8, computed in float32."""
    half = 2 ** (bits - 1)
    moved = (x.float() * scale.reciprocal()).round() + (zero_point.float() - half)
    return moved.clamp(-half, half - 1).to(torch.int8)


def round_static(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """x through its integers, in its own dtype: what a layer with integer activations computes with."""
    integers = quantize_static(x, scale, zero_point, bits)
    return (scale * (integers.float() - (zero_point.float() - 2 ** (bits - 1)))).to(x.dtype)
