import pytest
import torch
from torch import nn

from dacc.benchmarks.layers import W8A8, W8A8_BRANCH, quantize, quantized
from dacc.runtime.layers import QuantizedLinear


@pytest.mark.filterwarnings("ignore::dacc.runtime.step_table.OtherGridWarning")  # tables of other variants
@pytest.mark.parametrize("scheme", [W8A8, W8A8_BRANCH], ids=lambda scheme: scheme.name)
def test_layers_that_are_timed_compute_what_they_stand_for(scheme):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(160, 168)), torch.randn(40, 160)
    layer = quantized(model, {"0": scheme})
    assert isinstance(layer[0], QuantizedLinear)
    assert layer[0].scheme == scheme
    with torch.no_grad():
        expected, found = model(x), layer(x)
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_a_branch_leaves_less_to_round():
    torch.manual_seed(0)
    weight = torch.randn(168, 160)
    weight[:, 3] *= 50
    plain, beside = (quantize(weight, scheme).dequantize() for scheme in (W8A8, W8A8_BRANCH))
    assert float((beside - weight).norm()) < 0.2 * float((plain - weight).norm())
