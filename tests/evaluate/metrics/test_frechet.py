import pytest
import torch
from torchmetrics.image.fid import _compute_fid

from dacc.evaluate.metrics.frechet import frechet_distance, gaussian


def test_the_distance_of_one_dimensional_gaussians_is_known() -> None:
    first, second = (torch.tensor([1.0]), torch.tensor([[4.0]])), (torch.tensor([3.0]), torch.tensor([[9.0]]))
    assert frechet_distance(*first, *second) == pytest.approx((1 - 3) ** 2 + (2 - 3) ** 2)


def test_it_agrees_with_torchmetrics() -> None:
    torch.manual_seed(0)
    first, second = gaussian(torch.randn(200, 12)), gaussian(torch.randn(200, 12) * 1.5 + 0.3)
    assert frechet_distance(*first, *second) == pytest.approx(_compute_fid(*first, *second).item(), rel=1e-6)


def test_a_set_has_no_distance_to_itself_even_when_its_covariance_is_singular() -> None:
    few = gaussian(torch.randn(5, 32))
    assert frechet_distance(*few, *few) == pytest.approx(0, abs=1e-5)


def test_mean_and_covariance_are_the_usual_ones() -> None:
    features = torch.randn(50, 3)
    mean, covariance = gaussian(features)
    centered = features.double() - features.double().mean(0)
    torch.testing.assert_close(mean, features.double().mean(0))
    torch.testing.assert_close(covariance, centered.T @ centered / 49)
