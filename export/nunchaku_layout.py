"""How Nunchaku's kernels want their tensors: tiles of what the threads of one warp read, side by side.

Every layout is a permutation of the parts of the indices. Letters: N output and K input features, both multiples of
128; G = K / group_size groups of a row; r rank, a multiple of 16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FEATURES = 128  # both sizes of a weight are multiples of it
RANK = 16  # so is the rank of this


@dataclass(frozen=True)
class Tiling:
    """Cut the indices of a matrix into parts, and put these in another order.

    Args:
        rows: sizes of the parts of a row index, from the largest; the first is what the others leave.
        columns: likewise of a column index.
        order: of all parts, those of rows counted first.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    order: tuple[int, ...]

    def pack(self, matrix: Tensor) -> Tensor:
        """Entries in the order of the layout, flat."""
        return matrix.reshape(self._sizes(matrix.shape)).permute(self.order).flatten()

    def unpack(self, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        """The matrix of this shape that was packed."""
        sizes = self._sizes(shape)
        inverse = tuple(self.order.index(place) for place in range(len(sizes)))
        return packed.reshape([sizes[place] for place in self.order]).permute(inverse).reshape(shape)

    def _sizes(self, shape: torch.Size | tuple[int, ...]) -> list[int]:
        height, width = shape
        heads = [size // torch.Size(parts).numel() for size, parts in ((height, self.rows), (width, self.columns))]
        return [heads[0], *self.rows, heads[1], *self.columns]


CODES = Tiling((8, 2, 8), (2, 4, 8), (0, 4, 1, 3, 6, 2, 5, 7))  # (N, K) 4-bit codes
SCALES = Tiling((8, 2, 4, 2), (), (0, 5, 1, 3, 2, 4))  # (N, G) of integers, and (N, 1) vectors
MICRO_SCALES = Tiling((4, 4, 8), (4,), (0, 4, 3, 2, 1, 5))  # (N, G) of 4-bit floats
UP = Tiling((2, 8), (2, 4, 2), (0, 3, 2, 5, 1, 4, 6))  # (N, r)
WORDS = Tiling((4,), (2, 4, 8), (0, 2, 1, 3, 5, 4))  # (N, K) 4-bit codes that multiply floating-point inputs


def pack_codes(codes: Tensor) -> Tensor:
    """(N, K) 4-bit codes, signed or not -> (N, K / 2) int8."""
    return _pairs(CODES.pack(codes)).view(torch.int8).view(codes.shape[0], -1)


def unpack_codes(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """The codes (N, K) as unsigned numbers, uint8."""
    return CODES.unpack(_halves(packed.flatten().view(torch.uint8)), shape)


def pack_words(codes: Tensor) -> Tensor:
    """(N, K) unsigned 4-bit codes -> (N / 4, K / 2) int32."""
    return _pairs(WORDS.pack(codes)).view(torch.int32).view(codes.shape[0] // 4, -1)


def unpack_words(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """The codes (N, K), uint8."""
    return WORDS.unpack(_halves(packed.flatten().view(torch.uint8)), shape)


def pack_scales(scales: Tensor) -> Tensor:
    """(N, G) -> (G, N)."""
    return SCALES.pack(scales).view(scales.shape[1], scales.shape[0])


def unpack_scales(packed: Tensor) -> Tensor:
    """(G, N) -> (N, G)."""
    return SCALES.unpack(packed, (packed.shape[1], packed.shape[0]))


def pack_vector(values: Tensor) -> Tensor:
    """(N,) -> (N,)."""
    return SCALES.pack(values.view(-1, 1))


def unpack_vector(packed: Tensor) -> Tensor:
    """(N,) -> (N,)."""
    return SCALES.unpack(packed, (len(packed), 1)).view(-1)


def pack_micro_scales(scales: Tensor) -> Tensor:
    """(N, G) -> (G, N), of the same dtype."""
    return MICRO_SCALES.pack(scales).view(scales.shape[1], scales.shape[0])


def unpack_micro_scales(packed: Tensor) -> Tensor:
    """(G, N) -> (N, G)."""
    return MICRO_SCALES.unpack(packed, (packed.shape[1], packed.shape[0]))


def pack_up(up: Tensor) -> Tensor:
    """(N, r) -> (N, r)."""
    return UP.pack(up).view(up.shape)


def unpack_up(packed: Tensor) -> Tensor:
    """(N, r) -> (N, r)."""
    return UP.unpack(packed, (packed.shape[0], packed.shape[1]))


def pack_down(down: Tensor) -> Tensor:
    """(r, K) -> (K, r): tiles like those of the other factor, but each of them the other way round."""
    tiles = _turned(down.t(), down.shape[1], down.shape[0])
    return UP.pack(tiles).view(down.shape[1], down.shape[0])


def unpack_down(packed: Tensor) -> Tensor:
    """(K, r) -> (r, K)."""
    tiles = UP.unpack(packed, (packed.shape[0], packed.shape[1]))
    return _turned(tiles, packed.shape[0], packed.shape[1]).t()


def _turned(matrix: Tensor, height: int, width: int) -> Tensor:
    """Every tile of 16 x 16 transposed where it lies."""
    return matrix.reshape(height // RANK, RANK, width // RANK, RANK).transpose(1, 3).reshape(height, width)


def _pairs(codes: Tensor) -> Tensor:
    """Bytes of two codes, the first in the low half."""
    low, high = (codes.to(torch.int16) & 15).view(-1, 2).unbind(1)
    return (low | high << 4).to(torch.uint8)


def _halves(packed: Tensor) -> Tensor:
    """Codes of bytes, the low half first."""
    return torch.stack([packed & 15, packed >> 4], 1).flatten()
