"""Scales of NVFP4 weights: one for the tensor, so that those of the blocks fit E4M3, and one for each block of 16.

Letters: O rows, K input features, G = K / 16 blocks of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.nvfp4 import BLOCK, E2M1_MAX, E4M3_BYTES, E4M3_MAX, e4m3_bytes, e4m3_values, round_e2m1

NEIGHBOURS = range(-6, 13)  # E4M3 numbers tried around the one that makes the largest value 6: it becomes 10 to 2
SMALLEST = 2.0**-100  # scale of a tensor: its products with block scales and codes stay normal numbers
ROWS_VALUES = 1 << 19  # values treated at once: small enough to stay in cache


def nvfp4_scales(rows: Tensor, *, search: bool) -> tuple[Tensor, Tensor]:
    """The scale of a tensor () and those of its blocks (O, G), float32.

    Args:
        rows: (O, K), any float dtype.
        search: for the block scales with least squared error; otherwise the largest value of each block becomes 6.
    """
    whole = tensor_scale(rows)
    step = max(1, ROWS_VALUES // rows.shape[1])
    return whole, torch.cat([_block_scales(chunk, whole, search=search) for chunk in rows.split(step)])


def tensor_scale(rows: Tensor) -> Tensor:
    """The least scale () with no more digits than bfloat16 has whose block scales all fit E4M3. So few digits make its
    products with them and with codes exact in float32, in whatever order."""
    largest = rows.float().abs().max()
    found = (largest / (E2M1_MAX * E4M3_MAX)).clamp(min=SMALLEST).bfloat16()
    if found.float() * E2M1_MAX * E4M3_MAX < largest:
        found = torch.nextafter(found, torch.full_like(found, torch.inf))
    return found.float()


def _block_scales(rows: Tensor, whole: Tensor, *, search: bool) -> Tensor:
    blocks = rows.float().unflatten(1, (-1, BLOCK))  # (O, G, 16)
    first = e4m3_bytes(blocks.abs().amax(-1) / E2M1_MAX / whole).to(torch.int16)
    best, least = e4m3_values(first), _error(blocks, e4m3_values(first) * whole)
    for offset in NEIGHBOURS if search else ():
        scale = e4m3_values((first + offset).clamp(*E4M3_BYTES))
        error = _error(blocks, scale * whole)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def _error(blocks: Tensor, scale: Tensor) -> Tensor:
    """Squared error of each block, (O, G)."""
    scale = scale.unsqueeze(-1)
    return (round_e2m1(blocks / scale) * scale - blocks).square().sum(-1)
