from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dacc.core.scheme import Scheme
from dacc.quant.block import Treated
from dacc.quant.groupwise import treat_groups
from dacc.quant.methods import gptq, rtn, svdquant
from dacc.quant.methods.svdquant import SVDQuantConfig

W4A4 = Scheme(bits=4, act_bits=4, act_mode="dynamic", smooth=True)
PLAIN = Scheme(bits=4)


class Attention(nn.Module):
    """Three layers that read one tensor, one behind them, one that only sees the time, and one that never runs."""

    def __init__(self):
        super().__init__()
        self.out, self.v, self.k, self.q, self.time, self.idle = (nn.Linear(16, 16) for _ in range(6))

    def forward(self, x):
        attended = torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2), -1) @ self.v(x)
        return self.out(attended) * self.time(x[:, :1])


@pytest.fixture
def block(make_block):
    torch.manual_seed(0)
    schemes = {**dict.fromkeys(("out", "q", "v", "k", "idle"), W4A4), "time": PLAIN}
    mixing = torch.randn(16, 16) / 4
    return make_block(Attention(), [torch.randn(2, 30, 16) @ mixing for _ in range(4)], schemes)


def test_layers_that_read_one_tensor_come_together_with_what_enters_them(block):
    seen = []

    def quantize_group(weights, schemes, entering, config, seed):
        seen.append((sorted(weights), entering))
        return {name: Treated(rtn.quantize(weight, W4A4.plain, rtn.RTNConfig())) for name, weight in weights.items()}

    method = SimpleNamespace(**vars(svdquant) | {"quantize_group": quantize_group})
    found = treat_groups(block, method, SVDQuantConfig())
    assert list(found) == list(block.layers)
    assert [names for names, _ in seen] == [["k", "q", "v"], ["out"]]
    x = torch.cat([sighting.entering.args[0] for sighting in block.sightings]).flatten(0, 1)
    torch.testing.assert_close(seen[0][1].absmax, x.abs().amax(0))  # float, not rounded


def test_other_layers_are_treated_alone_and_what_never_runs_to_nearest(block):
    found = treat_groups(block, svdquant, SVDQuantConfig())
    x = torch.cat([sighting.entering.args[0][:, :1] for sighting in block.sightings]).flatten(0, 1)
    weight = block.layers["time"].weight
    expected = gptq.quantize(weight, PLAIN, gptq.GPTQConfig(), x.T @ x / len(x))
    assert float((found["time"].weight.dequantize() != expected.dequantize()).float().mean()) < 0.05
    assert found["idle"].method == "rtn"
    assert found["idle"].output_error is None
    assert found["idle"].weight.scheme == W4A4.plain


def test_a_unit_is_left_as_it_was(block):
    before = {name: layer.weight.clone() for name, layer in block.layers.items()}
    treat_groups(block, svdquant, SVDQuantConfig())
    assert all(torch.equal(layer.weight, before[name]) for name, layer in block.layers.items())
