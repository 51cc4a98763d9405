"""The best low-rank part of a matrix, by a randomized singular value decomposition (Halko, Martinsson and Tropp, 2009,
arXiv 0909.4061): a random sketch of the columns, sharpened by power iterations, spans the leading directions; what it
leaves to decompose is a few rows high.

Letters: O rows, K columns, r rank, Q columns of the sketch.
"""

from __future__ import annotations

import torch
from torch import Tensor

OVERSAMPLING = 10  # columns of the sketch beyond the rank
SMALL = 4  # a matrix less than so many sketches wide is decomposed as a whole
FLOAT16_MAX = torch.finfo(torch.float16).max


def low_rank_factors(matrix: Tensor, rank: int, *, seed: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Up (O, r) and down (r, K) whose product comes nearest to a matrix (O, K) float32, as they are stored.

    Each has the square root of the singular values, which keeps both within the range of float16.

    Args:
        iterations: power iterations; more: closer to the full decomposition, slower.
    """
    left, values, right = decompose(matrix, rank, seed=seed, iterations=iterations)
    roots = values.sqrt()
    return stored_factor(left * roots), stored_factor(roots[:, None] * right)


def decompose(matrix: Tensor, rank: int, *, seed: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular vectors and values: (O, r), (r,) and (r, K)."""
    width = rank + OVERSAMPLING
    found = None
    if SMALL * width < min(matrix.shape):
        found = _randomized(matrix, width, seed, iterations)
    if found is None or not all(bool(part.isfinite().all()) for part in found):
        found = torch.linalg.svd(matrix, full_matrices=False)
    left, values, right = found
    return left[:, :rank], values[:rank], right[:rank]


def _randomized(matrix: Tensor, width: int, seed: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device)  # (K, Q)
    basis = _orthonormal(matrix @ sketch)  # (O, Q)
    for _ in range(iterations):
        basis = _orthonormal(matrix @ _orthonormal(matrix.T @ basis))
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)  # of (Q, K)
    return basis @ left, values, right


def _orthonormal(columns: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(columns).Q
    return basis


def stored_factor(values: Tensor) -> Tensor:
    """float16, or float32 where float16 would overflow."""
    fits = values.numel() == 0 or float(values.abs().max()) <= FLOAT16_MAX
    return values.half() if fits else values.float()
