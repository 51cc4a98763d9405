import pytest
import torch

from dacc.quant.low_rank import decompose, low_rank_factors, stored_factor


def example(rows=200, columns=300):
    """Singular values that fall slowly, as those of trained weights do."""
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, rows, generator=generator, dtype=torch.float64)).Q
    return ((left * (1 + torch.arange(rows)) ** -0.5) @ right.T).float()


def left_over(matrix, rank, **fields):
    left, values, right = decompose(matrix, rank, **{"seed": 0, "iterations": 4, **fields})
    assert (left.shape, values.shape, right.shape) == ((len(matrix), rank), (rank,), (rank, matrix.shape[1]))
    return float((matrix.double() - (left * values).double() @ right.double()).norm())


@pytest.mark.parametrize("shape", [(200, 300), (300, 200), (20, 300)])
@pytest.mark.parametrize("rank", [1, 8, 20])
def test_it_leaves_hardly_more_than_the_full_decomposition(shape, rank):
    matrix = example(min(shape), max(shape))
    matrix = matrix if matrix.shape == shape else matrix.T
    best = float(torch.linalg.svdvals(matrix.double())[rank:].square().sum().sqrt())
    assert best * 0.999 <= left_over(matrix, rank) + 1e-5
    assert left_over(matrix, rank) <= 1.01 * best + 1e-5
    assert left_over(matrix, rank, iterations=1) <= 1.05 * best + 1e-5


def test_a_larger_rank_leaves_less():
    matrix = example()
    left = [left_over(matrix, rank) for rank in (1, 2, 4, 8, 16, 32, 64, 128, 200)]
    assert left == sorted(left, reverse=True)
    assert left[-1] < 1e-4


def test_the_same_seed_gives_the_same_bytes_and_touches_no_other_generator():
    matrix, state = example(), torch.get_rng_state()
    first, second = (decompose(matrix, 8, seed=3, iterations=4) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first[0], decompose(matrix, 8, seed=4, iterations=4)[0])


def test_where_the_sketch_fails_the_full_decomposition_serves(monkeypatch):
    matrix = example()
    expected = torch.linalg.svd(matrix, full_matrices=False)
    nothing = torch.full((1, 1), torch.nan)
    monkeypatch.setattr("dacc.quant.low_rank._randomized", lambda *_: (nothing, nothing, nothing))
    found = decompose(matrix, 8, seed=0, iterations=4)
    assert torch.equal(found[1], expected[1][:8])


def test_factors_share_the_singular_values_and_are_stored_in_float16():
    matrix = example()
    up, down = low_rank_factors(matrix, 8, seed=0, iterations=4)
    assert up.dtype == down.dtype == torch.float16
    torch.testing.assert_close(up.float().norm(dim=0), down.float().norm(dim=1), rtol=1e-3, atol=0)
    left, values, right = decompose(matrix, 8, seed=0, iterations=4)
    torch.testing.assert_close(up.float() @ down.float(), (left * values) @ right, rtol=0, atol=1e-3)


def test_a_factor_beyond_float16_is_float32():
    values = torch.tensor([[1.0, 65504.0]])
    assert stored_factor(values).dtype == torch.float16
    assert torch.equal(stored_factor(2 * values), 2 * values)
    up, down = low_rank_factors(1e11 * torch.ones(4, 4), 1, seed=0, iterations=4)
    assert up.dtype == down.dtype == torch.float32
    assert low_rank_factors(torch.zeros(4, 4), 1, seed=0, iterations=4)[0].isfinite().all()
