import pytest
import torch
from torch import nn

from dacc.core.scheme import Scheme
from dacc.quant.block import JUDGED, Block, Sighting, outputs_of, some_sightings
from dacc.quant.simulate import RoundedInputs
from dacc.quant.walk import UnitInput
from dacc.runtime.clock import current_run
from dacc.runtime.weight import to_rows

SCHEMES = {"0": Scheme(bits=4), "2": Scheme(bits=3)}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 2, 1))


@pytest.fixture
def block(make_block):
    return make_block(network(), [torch.randn(2, 3, 5, 5) for _ in range(4)], SCHEMES)


def test_it_runs_with_its_own_weights_or_with_others(block):
    sighting = block.sightings[1]
    assert torch.equal(block.run(sighting)[0], sighting.target[0])
    weight = block.module[2].weight
    (found,) = block.run(sighting, {"2": 3 * to_rows(weight)})
    expected = 3 * (sighting.target[0] - block.module[2].bias.view(-1, 1, 1)) + block.module[2].bias.view(-1, 1, 1)
    torch.testing.assert_close(found, expected)
    assert block.module[2].weight is weight


def test_other_weights_get_gradients(block):
    rows = to_rows(block.module[0].weight).clone().requires_grad_(True)
    block.run(block.sightings[0], {"0": rows})[0].square().sum().backward()
    assert rows.grad.shape == rows.shape
    assert bool(rows.grad.any())


def test_its_error_is_the_relative_distance_of_all_outputs(block):
    assert block.error() < 1e-6
    rows = {"2": to_rows(block.module[2].weight) + 0.1}
    wrong = power = 0.0
    for sighting in block.sightings:
        wrong += float((block.run(sighting, rows)[0] - sighting.target[0]).double().square().sum())
        power += float(sighting.target[0].double().square().sum())
    assert block.error(rows) == pytest.approx((wrong / power) ** 0.5)


@pytest.mark.parametrize("calls", [20, 24, 50])
def test_its_error_is_judged_on_calls_from_the_whole_grid(calls, make_block):
    inputs = [torch.full((1, 3, 5, 5), float(number)) for number in range(4 * calls)]  # one set after the other
    block, seen = make_block(network(), inputs, SCHEMES, calls=calls), []
    block.module.register_forward_pre_hook(lambda *_: seen.append(current_run().call))
    block.error()
    assert len(seen) == JUDGED
    assert len(set(seen)) > JUDGED / 2
    assert min(seen) < calls / 4
    assert max(seen) > 3 * calls / 4


def test_of_many_calls_some_are_taken_always_the_same():
    calls = list(range(1000))
    found = some_sightings(calls, 80)
    assert len(found) == 80
    assert found == some_sightings(calls, 80) == sorted(set(found))
    assert min(found) < 50
    assert max(found) > 950
    assert some_sightings(calls[:80], 80) == calls[:80]


def test_calls_without_a_target_are_left_out_of_the_error(make_block):
    plain = make_block(network(), [torch.randn(1, 3, 5, 5)], SCHEMES)
    blind = Sighting(None, UnitInput((torch.full((1, 3, 5, 5), 1e6),), {}))
    both = Block("", plain.module, plain.plans, [*plain.sightings, blind], plain.rounding, 0)
    rows = {"0": 1.1 * to_rows(plain.module[0].weight)}
    assert both.error(rows) == plain.error(rows) > 0
    assert blind.call == 0


def test_it_runs_where_the_call_was(block):
    seen = []
    block.module.register_forward_hook(lambda *_: seen.append(current_run().call))
    for sighting in block.sightings:
        block.run(sighting)
    assert seen == [sighting.call for sighting in block.sightings] == [0, 1, 2, 0]


@pytest.mark.parametrize(("name", "layer", "inside"), [("", "a.b", "a.b"), ("a", "a.b.c", "b.c"), ("a.b", "a.b", "")])
def test_layers_are_known_by_their_place_in_the_unit(name, layer, inside, block):
    unit = Block(name, block.module, (), (), block.rounding, 0)
    assert unit.inside(layer) == inside


def test_a_layer_can_be_a_unit_alone(block):
    layer, plan = block.module[2], block.plans[1]
    x = torch.randn(1, 4, 3, 3)
    sighting = Sighting(None, UnitInput((x,), {}), (layer(x),))
    unit = Block("2", layer, (plan,), [sighting], RoundedInputs(layer, {}), 0)
    assert unit.layers == {"2": layer}
    assert unit.scheme("2") == SCHEMES["2"]
    (found,) = unit.run(sighting, {"2": 0 * to_rows(layer.weight)})
    torch.testing.assert_close(found, layer.bias.view(1, -1, 1, 1).expand_as(found))


def test_fewer_layers_can_be_treated(block):
    fewer = block.only(block.plans[:1])
    assert list(fewer.layers) == ["0"]
    assert fewer.sightings is block.sightings
    assert list(block.layers) == ["0", "2"]


def test_what_is_learned_from_is_drawn_from_all_calls_or_from_larger_pieces(block):
    generator = torch.Generator().manual_seed(0)
    drawn = {id(block.drawn(generator)) for _ in range(200)}
    assert drawn == {id(sighting) for sighting in block.sightings}
    pieces = block.sightings[:1]
    merged = Block("", block.module, block.plans, block.sightings, block.rounding, 0, merged=pieces)
    assert merged.drawn(generator) is pieces[0]


def test_outputs_are_all_float_tensors_however_they_are_nested():
    x = torch.randn(2)
    assert outputs_of(x) == (x,)
    found = outputs_of((x, {"rest": [x + 1, torch.arange(3), None]}, 5))
    assert [torch.equal(mine, wanted) for mine, wanted in zip(found, (x, x + 1), strict=True)] == [True, True]
