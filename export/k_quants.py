"""Q4_K, Q5_K and Q6_K of GGUF: super-blocks of 256 values, whose small blocks have integer scales of their own against
half-precision ones of the whole. The gguf package reads these types and does not write them.

    Q4_K, Q5_K    8 blocks of 32:     x = d s q - m t,   q of 4 or 5 bits, s and t of 6 bits
    Q6_K          16 blocks of 16:    x = d s q,         q of 6 bits with a sign, s of 8 bits with a sign

Scales are searched for by squared error. Letters: S super-blocks, J blocks of a super-block, N values of a block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SUPER = 256
SHRINKS = torch.linspace(1.0, 0.7, 13)  # shares of the range that are tried
REFITS = 2  # least-squares steps on scale and offset


def quantize_k(rows: Tensor, kind: str) -> Tensor:
    """Rows (O, K), K a multiple of 256, as the bytes of a type: (O, K / 256 * bytes of a super-block) uint8.

    Args:
        kind: "Q4_K", "Q5_K" or "Q6_K".
    """
    blocks = _KINDS[kind](rows.float().reshape(-1, SUPER))
    return blocks.reshape(len(rows), -1)


def _q4(values: Tensor) -> Tensor:
    head, codes = _affine(values, 15)
    return torch.cat([head, _nibbles(codes)], 1)


def _q5(values: Tensor) -> Tensor:
    head, codes = _affine(values, 31)
    places = torch.arange(8, dtype=torch.int16).view(8, 1)  # the fifth bit of block j is bit j of 32 bytes
    high = ((codes >> 4) << places).sum(1)
    return torch.cat([head, _bytes(high), _nibbles(codes & 15)], 1)


def _q6(values: Tensor) -> Tensor:
    blocks = values.reshape(-1, 16, 16)
    scale = _best_scale(blocks)  # (S, 16)
    largest = scale.abs().amax(1, keepdim=True)
    whole = _half(largest / 127)
    small = _divided(scale, whole).round().clamp(-128, 127)
    codes = _divided(blocks, (whole * small).unsqueeze(-1)).round().clamp(-32, 31).to(torch.int16) + 32
    quarters = codes.reshape(-1, 2, 4, 32)  # halves of 128 values, in four rows of 32
    low = quarters & 15
    first, second, third, fourth = low.unbind(2)
    nibbles = torch.stack([first | third << 4, second | fourth << 4], 2)  # (S, 2, 2, 32)
    places = 2 * torch.arange(4, dtype=torch.int16).view(4, 1)
    high = ((quarters >> 4) << places).sum(2)  # (S, 2, 32)
    return torch.cat([_bytes(nibbles), _bytes(high), small.to(torch.int8).view(torch.uint8), _half_bytes(whole)], 1)


_KINDS: dict[str, Callable[[Tensor], Tensor]] = {"Q4_K": _q4, "Q5_K": _q5, "Q6_K": _q6}


def _affine(values: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Bytes of the scales (S, 16), and codes (S, 8, 32) int16 of 0 ... top."""
    blocks = values.reshape(-1, 8, 32)
    scale, offset = _best_affine(blocks, top)  # (S, 8)
    whole, lowest = (_half(part.amax(1, keepdim=True) / 63) for part in (scale, offset))
    small = _divided(scale, whole).round().clamp(0, 63)
    shift = _divided(offset, lowest).round().clamp(0, 63)
    moved = blocks + (lowest * shift).unsqueeze(-1)
    codes = _divided(moved, (whole * small).unsqueeze(-1)).round().clamp(0, top)
    packed = _packed_scales(small.to(torch.int16), shift.to(torch.int16))
    return torch.cat([_half_bytes(whole), _half_bytes(lowest), packed], 1), codes.to(torch.int16)


def _packed_scales(small: Tensor, shift: Tensor) -> Tensor:
    """Two times eight numbers of 6 bits in 12 bytes: the last four of each lend their upper bits to the first."""
    first, last = small.split(4, 1)
    low, high = shift.split(4, 1)
    return _bytes(torch.cat([first | (last >> 4) << 6, low | (high >> 4) << 6, (last & 15) | (high & 15) << 4], 1))


def _best_affine(blocks: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scale s >= 0 and offset t >= 0 (S, J) for which s q - t comes nearest to the values, q = 0 ... top."""
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    best = torch.full_like(low, float("inf"))
    scale, offset = torch.zeros_like(low), torch.zeros_like(low)
    for shrink in SHRINKS.tolist():
        trial, away = (high - low) * shrink / top, -low * shrink
        for _ in range(1 + REFITS):
            codes = _divided(blocks + away.unsqueeze(-1), trial.unsqueeze(-1)).round().clamp(0, top)
            error = (codes * trial.unsqueeze(-1) - away.unsqueeze(-1) - blocks).square().sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            scale, offset = torch.where(better, trial, scale), torch.where(better, away, offset)
            trial, away = _refitted(blocks, codes)
    return scale, offset


def _refitted(blocks: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset by least squares for given codes; an offset below 0, which the format has not, is 0."""
    q, x = codes.mean(-1), blocks.mean(-1)
    spread = (codes - q.unsqueeze(-1)).square().mean(-1)
    slope = _divided(((codes - q.unsqueeze(-1)) * blocks).mean(-1), spread).clamp(min=0)
    offset = slope * q - x
    through = _divided((codes * blocks).mean(-1), codes.square().mean(-1)).clamp(min=0)
    return torch.where(offset >= 0, slope, through), offset.clamp(min=0)


def _best_scale(blocks: Tensor) -> Tensor:
    """Scale (S, J), of either sign, for which s q comes nearest to the values, q = -32 ... 31."""
    place = blocks.abs().argmax(-1, keepdim=True)
    extreme = blocks.gather(-1, place).squeeze(-1)  # stands at -32, the larger end
    best, scale = torch.full_like(extreme, float("inf")), torch.zeros_like(extreme)
    for shrink in SHRINKS.tolist():
        trial = -extreme * shrink / 32
        for _ in range(1 + REFITS):
            codes = _divided(blocks, trial.unsqueeze(-1)).round().clamp(-32, 31)
            error = (codes * trial.unsqueeze(-1) - blocks).square().sum(-1)
            better = error < best
            best, scale = torch.where(better, error, best), torch.where(better, trial, scale)
            trial = _divided((codes * blocks).sum(-1), codes.square().sum(-1))
    return scale


def _divided(values: Tensor, by: Tensor) -> Tensor:
    """values / by, and 0 where that is by 0."""
    return torch.where(by == 0, 0.0, values / torch.where(by == 0, 1.0, by))


def _half(values: Tensor) -> Tensor:
    """As half precision holds them."""
    return values.half().float()


def _half_bytes(values: Tensor) -> Tensor:
    """(S, 1) -> (S, 2) uint8."""
    return values.half().view(torch.uint8)


def _nibbles(codes: Tensor) -> Tensor:
    """(S, 8, 32) 4-bit codes -> (S, 128): of two neighbouring blocks the first in the low halves."""
    pairs = codes.reshape(-1, 4, 2, 32)
    return _bytes(pairs[:, :, 0] | pairs[:, :, 1] << 4)


def _bytes(values: Tensor) -> Tensor:
    """(S, ...) small integers -> (S, bytes) uint8."""
    return values.flatten(1).to(torch.uint8)
