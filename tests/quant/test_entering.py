import pytest
import torch
from torch import nn

from dacc.core.errors import CalibrationError
from dacc.core.scheme import Scheme
from dacc.quant.entering import entering_of

W4 = Scheme(bits=4, smooth=True)


class Pair(nn.Module):
    """The second layer runs on what the first gives; the third never."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.idle = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(6, 6)

    def forward(self, x):
        return self.second(self.first(x))


def block_of(make_block, inputs):
    torch.manual_seed(0)
    return make_block(Pair(), inputs, dict.fromkeys(("first", "second", "idle"), W4))


def test_statistics_are_those_of_all_rows(make_block):
    inputs = [torch.randn(2, 5, 6) * (1 + number) for number in range(3)]
    block = block_of(make_block, inputs)
    found = entering_of(block, ["first", "second", "idle"])
    assert set(found) == {"first", "second"}
    with torch.no_grad():
        expected = {
            "first": torch.cat(inputs).flatten(0, 1),
            "second": block.module.first(torch.cat(inputs)).flatten(0, 1),
        }
    for name, rows in expected.items():
        torch.testing.assert_close(found[name].absmax, rows.abs().amax(0))
        assert found[name].lowest == pytest.approx(float(rows.min()))
        torch.testing.assert_close(found[name].gram, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-4)
        assert torch.equal(found[name].rows.sort(0).values, rows.sort(0).values)
    assert not any(layer._forward_pre_hooks for layer in block.layers.values())


def test_many_rows_are_drawn_and_the_largest_value_is_found_all_the_same(make_block, monkeypatch):
    monkeypatch.setattr("dacc.quant.entering.ROWS", 300)
    monkeypatch.setattr("dacc.quant.entering.KEPT", 60)
    inputs = [torch.randn(1, 400, 6) for _ in range(3)]
    inputs[1][0, 7, 2] = 99.0
    inputs[2][0, 3, 1] = -98.0
    found = entering_of(block_of(make_block, inputs), ["first"])["first"]
    assert found.absmax[2] == 99
    assert found.lowest == -98
    assert found.rows.shape == (60, 6)
    again = entering_of(block_of(make_block, inputs), ["first"])["first"]
    assert torch.equal(again.rows, found.rows)
    assert torch.equal(again.gram, found.gram)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_statistics_that_mean_nothing_are_refused(make_block, bad):
    x = torch.randn(1, 5, 6)
    x[0, 0, 0] = bad
    with pytest.raises(CalibrationError, match="what enters first holds NaN or infinity"):
        entering_of(block_of(make_block, [x]), ["first"])
