"""What enters layers, as statistics: means over the very rows that the layer multiplies."""

import pytest
import torch
from torch import nn

from dacc.core.scheme import Scheme
from dacc.quant.moments import CALLS, moments_of
from dacc.quant.simulate import rounding_of
from dacc.runtime.clock import fixed_run

W4 = Scheme(bits=4)
SCHEMES = [
    W4,
    Scheme(bits=4, act_bits=4, act_mode="dynamic"),
    Scheme(bits=4, act_bits=4, act_mode="static"),
    Scheme(bits=4, act_bits=4, act_mode="per-step", act_steps=3),
    Scheme(bits=4, act_bits=4, act_mode="static", split=8),
]


def unit(make_block, scheme):
    """A linear behind another one; the inputs of the unit differ from those in the float network."""
    torch.manual_seed(0)
    inputs = [1 + torch.randn(20, 12) * (1 + number) for number in range(6)]
    entering = [x + 0.3 * torch.randn_like(x) for x in inputs]
    module = nn.Sequential(nn.Linear(12, 16), nn.SiLU(), nn.Linear(16, 5))
    return make_block(module, inputs, {"2": scheme}, entering=entering), entering, inputs


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_formula_equals_means_over_all_rows(scheme, make_block):
    block, entering, inputs = unit(make_block, scheme)
    (found,) = moments_of(block, ["2"], [scheme], "mse")
    rounding, here, intact = rounding_of(scheme, block.module[2], found.acts), [], []
    for sighting, x, clean in zip(block.sightings, entering, inputs, strict=True):
        with fixed_run(sighting.state):
            entered = block.module[:2](x)
            here.append(rounding(entered) if rounding else entered)
        intact.append(block.reference[:2](clean))
    here, intact, weight = torch.cat(here), torch.cat(intact), block.module[2].weight
    apart = intact - here
    torch.testing.assert_close(found.gram, here.T @ here / len(here))
    torch.testing.assert_close(found.lag, apart.T @ here / len(here))
    torch.testing.assert_close(found.mean, here.mean(0))
    torch.testing.assert_close(found.drift, apart.mean(0))
    assert found.lost["2"] == pytest.approx(float((apart @ weight.T).square().sum(1).mean()), rel=1e-4)
    assert found.power["2"] == pytest.approx(float((intact @ weight.T).square().sum(1).mean()), rel=1e-4)
    assert (found.acts is not None) == scheme.has_fixed_acts
    about = found.about_means(weight, "2")
    torch.testing.assert_close(about.gram, torch.cov(here.T, correction=0), rtol=1e-4, atol=1e-4)
    centred = apart @ weight.T - (apart @ weight.T).mean(0)
    assert about.lost["2"] == pytest.approx(float(centred.square().sum(1).mean()), rel=1e-3)


@pytest.mark.parametrize("rows", [1, 400])
def test_features_that_never_change_have_no_moments_about_their_means(rows, make_block):
    torch.manual_seed(0)
    module, always = nn.Sequential(nn.Linear(48, 5)), 30 * torch.randn(48)
    inputs = [always.expand(rows, 48).clone() for _ in range(CALLS)]
    for number, x in enumerate(inputs):
        x[:, 7] += 1e-2 * x[:, 7] * (number % 3)
    (found,) = moments_of(make_block(module, inputs, {"0": W4}), ["0"], [W4], "mse")
    gram = found.about_means(module[0].weight, "0").gram
    assert gram.nonzero().tolist() == [[7, 7]]


def test_every_way_to_round_has_statistics_of_its_own(make_block):
    split = SCHEMES[-1]
    block, _, _ = unit(make_block, split)
    whole = split.model_copy(update={"split": None})
    one, other = moments_of(block, ["2"], [split, whole], "minmax")
    assert (one.acts.scale.shape, other.acts.scale.shape) == ((1, 2), (1, 1))
    assert not torch.equal(one.gram, other.gram)
    alone = moments_of(unit(make_block, whole)[0], ["2"], [whole], "minmax")[0]
    torch.testing.assert_close(other.gram, alone.gram)


def test_layers_that_multiply_no_rows_or_never_run_have_none(make_block):
    grouped = nn.Sequential(nn.Conv2d(8, 8, 1, groups=2))
    assert moments_of(make_block(grouped, [torch.randn(2, 8, 3, 3)], {"0": W4}), ["0"], [W4], "mse") == []
    idle = nn.Module()
    idle.never, idle.forward = nn.Linear(4, 4), lambda x: x
    assert moments_of(make_block(idle, [torch.randn(2, 4)], {"never": W4}), ["never"], [W4], "mse") == []
