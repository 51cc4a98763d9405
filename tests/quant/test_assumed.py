import torch

from dacc.quant.assumed import ROWS, assumed_inputs
from dacc.quant.smoothing import DATA_FREE


def test_inputs_are_as_much_larger_as_weights_are_smaller_up_to_a_factor():
    weight = torch.ones(8, 64)
    weight[:, 3], weight[:, 5] = 0.5, 1e-6
    found = assumed_inputs(weight, 0)
    assert found.rows.shape == (ROWS, 64)
    sizes = found.gram.diagonal().sqrt()
    torch.testing.assert_close(sizes[3] / sizes[0], torch.tensor(2.0), rtol=0.02, atol=0)
    assert sizes[5] == DATA_FREE == sizes.max()
    torch.testing.assert_close(found.rows.std(0) / sizes, torch.ones(64), rtol=0.2, atol=0)
    assert torch.equal(found.absmax, found.rows.abs().amax(0))


def test_the_same_seed_draws_the_same_inputs():
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(assumed_inputs(weight, 1).rows, assumed_inputs(weight, 1).rows)
    assert not torch.equal(assumed_inputs(weight, 1).rows, assumed_inputs(weight, 2).rows)
