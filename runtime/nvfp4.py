"""NVFP4 in plain torch: 4-bit floats (E2M1) in blocks of 16, each with an 8-bit scale (E4M3), and one float32 scale for
the whole tensor.

    E2M1    sign, 2 bits of exponent, 1 of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives
    E4M3    sign, 4 bits of exponent, 3 of mantissa: up to 448, in steps of an eighth of a power of two

Two codes share a byte, as packing.py has it for all 4-bit codes. Letters: R rows, K codes per row, G = K / 16 blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.scheme import NVFP4_GROUP

BLOCK = NVFP4_GROUP
E2M1_MAX, E4M3_MAX = 6.0, 448.0
E4M3_BYTES = 1, 126  # of its positive numbers, in rising order
MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
VALUES = torch.cat([MAGNITUDES, -MAGNITUDES])  # of the codes 0 to 15: the highest bit is the sign
_PAIRS = torch.stack([VALUES.repeat(16), VALUES.repeat_interleave(16)], 1)  # (256, 2), of the bytes
_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # (256,), of the bytes


def round_e2m1(units: Tensor) -> Tensor:
    """The nearest E2M1 numbers of any float32 values; ties go to the even code, what is too large to the largest."""
    magnitude = units.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return ((magnitude / step).round() * step).clamp(max=E2M1_MAX) * units.sign()


def e2m1_codes(values: Tensor) -> Tensor:
    """Codes 0 to 15, uint8, of E2M1 numbers; both zeros have code 0."""
    found = torch.bucketize(values.abs(), MAGNITUDES.to(values.device)) + 8 * (values < 0)
    return found.to(torch.uint8)


def e2m1_values(packed: Tensor) -> Tensor:
    """(R, K) float32 from rows of packed codes (R, K / 2)."""
    return _PAIRS.to(packed.device)[packed.int()].flatten(1)


def e4m3_bytes(values: Tensor) -> Tensor:
    """uint8, the E4M3 numbers nearest to positive values; never 0, and at most 448."""
    bounded = values.clamp(float(_E4M3[E4M3_BYTES[0]]), E4M3_MAX)
    return bounded.to(torch.float8_e4m3fn).view(torch.uint8)


def e4m3_values(stored: Tensor) -> Tensor:
    """float32 of the bytes of E4M3 numbers."""
    return _E4M3.to(stored.device)[stored.int()]


def nvfp4_rows(qweight: Tensor, scale: Tensor, group_scale: Tensor) -> Tensor:
    """(R, K) float32 of packed rows (R, K / 2), the scale of the tensor (1, 1) and bytes of block scales (R, G)."""
    blocks = e2m1_values(qweight).unflatten(1, (-1, BLOCK))
    return (blocks * (e4m3_values(group_scale) * scale).unsqueeze(-1)).flatten(1)
