import pytest
import torch

from dacc.quant.smoothing import ALWAYS, DATA_FREE, LARGEST, smoothings


def example():
    generator = torch.Generator().manual_seed(0)
    absmax = torch.rand(12, generator=generator) + 0.5
    return absmax, [torch.randn(5, 12, generator=generator), torch.randn(7, 12, generator=generator)]


def test_formula_is_a_ratio_of_powers_of_the_largest_values():
    absmax, weights = example()
    span = [max(float(weight[:, column].abs().max()) for weight in weights) for column in range(12)]
    found = smoothings(absmax, weights, 4)
    assert len(found) == ALWAYS + 2 * 3
    place = ALWAYS
    for alpha in (0.25, 0.5, 0.75):
        for beta in (0.0, 1 - alpha):
            slow = torch.tensor([float(absmax[column]) ** alpha / span[column] ** beta for column in range(12)])
            slow = slow / slow.log().mean().exp()
            torch.testing.assert_close(found[place].float(), slow, rtol=2**-8, atol=0)
            place += 1


def test_no_smoothing_and_factors_of_the_weight_alone_come_first():
    absmax, weights = example()
    none, data_free = smoothings(absmax, weights, 4)[:ALWAYS]
    assert none is None
    assert torch.equal(data_free, smoothings(3 * absmax.flip(0), weights, 4)[1])
    assert data_free.min() >= 1 / DATA_FREE
    assert data_free.max() <= DATA_FREE
    order = torch.cat(weights).abs().amax(0).argsort()
    assert torch.equal(data_free[order].sort(descending=True).values, data_free[order])


def test_factors_are_the_same_in_both_narrow_types():
    for factors in smoothings(*example(), 10)[1:]:
        assert factors.dtype == torch.float16
        assert torch.equal(factors.bfloat16().float(), factors.float())


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_extreme_channels_stay_in_range(size):
    absmax, weights = example()
    absmax[3] = size
    weights[0][:, 5] = weights[1][:, 5] = size
    for factors in smoothings(absmax, weights, 5)[1:]:
        assert factors.isfinite().all()
        assert float(factors.min()) >= 0.99 / LARGEST
        assert float(factors.max()) <= 1.01 * LARGEST


def test_a_channel_that_is_always_zero_counts_as_one():
    absmax, weights = example()
    absmax[3] = 0
    ones = absmax.clone()
    ones[3] = 1
    for found, expected in zip(smoothings(absmax, weights, 5), smoothings(ones, weights, 5), strict=True):
        assert found is expected is None or torch.equal(found, expected)
