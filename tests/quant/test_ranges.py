"""Fixed activation scales: ranges against brute force, tables row by row, and what is watched when."""

import pytest
import torch
from torch import nn

from dacc.core.errors import CalibrationError
from dacc.core.scheme import Scheme
from dacc.quant.block import Treated
from dacc.quant.methods.rtn import RTNConfig, quantize
from dacc.quant.ranges import (
    UNSEEN,
    VALUES,
    Observed,
    best_range,
    dynamic_roundings,
    find_scales,
    grid_of,
    is_guessed,
    observe,
    quantized_weights,
    roundings_of,
    scale_of,
    with_scales,
)
from dacc.quant.simulate import rounding_of
from dacc.runtime.activation import ActivationScale

STATIC = Scheme(bits=8, act_bits=8, act_mode="static")
PER_STEP = Scheme(bits=8, act_bits=8, act_mode="per-step", act_steps=3)


def seen(values):
    return Observed(values.flatten(), float(values.min()), float(values.max()))


def through(x, scale, zero, bits):
    codes = ((x / scale).round() + float(zero)).clamp(0, 2**bits - 1)
    return (codes - float(zero)) * scale


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_grid_covers_its_range_and_zero(bits):
    for low, high in ((-1.0, 3.0), (0.5, 2.0), (-3.0, -1.0), (0.0, 0.0)):
        scale, zero = grid_of(torch.tensor(low), torch.tensor(high), bits)
        ends = torch.tensor([min(low, 0.0), 0.0, max(high, 0.0)])
        found = through(ends, scale, zero, bits)
        assert found[1] == 0
        assert (found - ends).abs().max() <= float(scale) / 2 + 1e-6
        assert (scale.dtype, zero.dtype) == (torch.float32, torch.uint8)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("sign", [1, -1, 0])
def test_minmax_is_the_lowest_and_the_highest_value_of_all_calls(bits, sign):
    torch.manual_seed(0)
    batches = [torch.randn(50) * (number + 1) for number in range(3)]
    batches = [sign * batch.abs() if sign else batch for batch in batches]
    scheme = STATIC.model_copy(update={"act_bits": bits})
    found = scale_of(scheme, [[(number, seen(batch)) for number, batch in enumerate(batches)]], "minmax")
    values = torch.cat([*batches, torch.zeros(1)])
    step = float(values.max() - values.min()) / (2**bits - 1)
    assert found.scale.item() == pytest.approx(step)
    assert found.zero_point.item() == round(float(-values.min()) / step)


def slow_search(values, low, high, bits, candidates=80):
    """Every share of the range, one after the other."""
    best = None
    for number in range(candidates):
        share = 1 - 0.01 * number
        step = share * (high - low) / (2**bits - 1)
        zero = min(max(round(-share * low / step), 0), 2**bits - 1)
        codes = ((values.double() / step).round() + zero).clamp(0, 2**bits - 1)
        error = float(((codes - zero) * step - values.double()).abs().pow(2.4).mean())
        if best is None or error < best[0]:
            best = error, step, zero
    return best


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_the_search_equals_trying_every_range(bits):
    torch.manual_seed(bits)
    values = torch.cat([torch.randn(2000), torch.tensor([9.0])])
    scheme = STATIC.model_copy(update={"act_bits": bits})
    found = scale_of(scheme, [[(0, seen(values))]], "mse")
    error, step, zero = slow_search(values, float(values.min()), float(values.max()), bits)
    assert found.scale.item() == pytest.approx(step, rel=1e-5)
    assert found.zero_point.item() == zero
    widest = scale_of(scheme, [[(0, seen(values))]], "minmax")
    rounded = through(values, widest.scale[0, 0], widest.zero_point[0, 0], bits)
    assert error <= float((rounded - values).abs().pow(2.4).mean()) * (1 + 1e-5)
    if bits < 8:
        assert found.scale.item() < 0.9 * widest.scale.item()


def test_the_best_of_given_ranges_is_taken():
    values = torch.linspace(-1, 1, 101)
    low, high = torch.tensor([-9.0, -1.0, -0.2]), torch.tensor([9.0, 1.0, 0.2])
    assert [float(end) for end in best_range(values, low, high, 4)] == [-1.0, 1.0]


def test_a_function_finds_ranges_from_what_was_seen_record_by_record():
    asked = []

    def finder(records, bits):
        asked.append((len(records), bits))
        return torch.tensor(-1.0), torch.tensor(2.0)

    found = scale_of(PER_STEP, [[(call, seen(torch.randn(5))) for call in (0, 1, 1, 2)]], finder)
    assert asked == [(1, 8), (2, 8), (1, 8), (4, 8)]
    assert torch.equal(found.scale, torch.full((4, 1), 3 / 255))


# tables


def test_rows_of_a_table_are_those_of_their_calls_and_the_last_is_that_of_all():
    batches = [torch.linspace(-1, 1, 9) * size for size in (1.0, 5.0, 0.1)]
    records = [(call, seen(batch)) for call, batch in enumerate(batches)]
    table = scale_of(PER_STEP, [records], "minmax")
    assert table.scale.shape == table.zero_point.shape == (4, 1)
    for call, record in enumerate(records):
        assert table.scale[call] == scale_of(STATIC, [[record]], "minmax").scale[0]
    assert table.scale[3] == scale_of(STATIC, [records], "minmax").scale[0] == table.scale[1]


def test_calls_that_were_not_recorded_take_the_nearest_that_was():
    scheme = PER_STEP.model_copy(update={"act_steps": 8})
    records = [(call, seen(torch.tensor([0.0, float(call + 1)]))) for call in (1, 5, 6)]
    table = scale_of(scheme, [records], "minmax")
    of_call = {call: (call + 1) / 255 for call in (1, 5, 6)}
    expected = [of_call[call] for call in (1, 1, 1, 1, 5, 5, 6, 6, 6)]
    torch.testing.assert_close(table.scale[:, 0], torch.tensor(expected))


@pytest.mark.parametrize("scheme", [STATIC, PER_STEP, PER_STEP.model_copy(update={"split": 3})], ids=lambda s: s.name)
def test_a_layer_that_never_runs_has_a_table_that_does_no_harm(scheme):
    found = scale_of(scheme, [[] for _ in range(scheme.parts)], "mse")
    assert found.scale.shape == found.zero_point.shape == ((scheme.act_steps or 0) + 1, scheme.parts)
    assert (found.scale == 2 * UNSEEN / 2**scheme.act_bits).all()
    assert found.zero_point.dtype == torch.uint8
    assert is_guessed(found, scheme.act_bits)
    assert is_guessed(ActivationScale(found.scale.log().exp(), found.zero_point), scheme.act_bits)
    known = scale_of(scheme, [[(0, seen(torch.tensor([-7.0, 8.0])))] for _ in range(scheme.parts)], "minmax")
    assert not is_guessed(known, scheme.act_bits)


# watching a unit


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))


def test_scales_of_a_unit_are_those_of_what_enters_its_layers(make_block):
    inputs = [torch.randn(5, 8) * (number + 1) for number in range(6)]
    schemes = {"0": PER_STEP, "1": STATIC}
    block = make_block(two_layers(), inputs, schemes)
    found = find_scales(block, "minmax")
    hidden = [block.module[0](x) for x in inputs]
    for call in range(3):
        mine = [x for number, x in enumerate(inputs) if number % 3 == call]
        assert found["0"].scale[call] == scale_of(STATIC, [[(0, seen(torch.cat(mine)))]], "minmax").scale[0]
    assert found["1"].scale[0] == scale_of(STATIC, [[(0, seen(torch.cat(hidden)))]], "minmax").scale[0]


def test_each_part_of_a_split_layer_is_watched_by_itself(make_block):
    layer = nn.Sequential(nn.Conv2d(6, 2, 1))
    x = torch.randn(3, 6, 4, 4) * torch.tensor([50.0] * 4 + [1.0] * 2).view(-1, 1, 1)
    scheme = STATIC.model_copy(update={"split": 4})
    found = find_scales(make_block(layer, [x], {"0": scheme}), "minmax")["0"]
    for number, part in enumerate(x.split([4, 2], dim=1)):
        expected = scale_of(STATIC, [[(0, seen(part))]], "minmax")
        assert found.scale[0, number] == expected.scale[0, 0]
        assert found.zero_point[0, number] == expected.zero_point[0, 0]


@pytest.mark.parametrize("mode", [{"act_mode": "dynamic"}, {"act_mode": "per-group", "act_group_size": 4}])
def test_dynamic_and_weight_only_layers_have_no_scales(mode, make_block):
    dynamic = Scheme(bits=8, act_bits=8, **mode)
    block = make_block(two_layers(), [torch.randn(5, 8)], {"0": Scheme(bits=4), "1": dynamic})
    assert find_scales(block) == {}
    roundings = dynamic_roundings(block)
    assert list(roundings) == ["1"]
    x = torch.randn(3, 8)
    assert torch.equal(roundings["1"](x), rounding_of(dynamic, block.module[1], None)(x))


def test_the_layers_of_the_unit_are_watched_unrounded(make_block):
    block = make_block(two_layers(), [torch.randn(5, 8)], {"0": STATIC, "1": STATIC})
    expected = find_scales(block, "mse")
    for name in ("0", "1"):
        block.rounding.put(name, torch.zeros_like)
    found = find_scales(block, "mse")
    assert all(torch.equal(found[name].scale, expected[name].scale) for name in expected)
    assert not block.module(torch.randn(1, 8)).sub(block.module[1].bias).any()  # they are rounded again


def test_few_values_are_kept_of_many_but_both_ends_are_known(make_block):
    x = torch.randn(1000, 8)
    x[7, 3], x[8, 4] = 100.0, -90.0
    block = make_block(two_layers(), [x], {"0": STATIC})
    ((_, record),) = observe(block, ["0"])["0"][0]
    assert (record.low, record.high) == (-90.0, 100.0)
    assert record.values.shape == (VALUES,)
    again = observe(block, ["0"])["0"][0][0][1]
    assert torch.equal(again.values, record.values)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_refused(value, make_block):
    x = torch.randn(5, 8)
    block = make_block(two_layers(), [torch.randn(5, 8), x], {"0": STATIC, "1": STATIC})
    x[2, 3] = value
    with pytest.raises(CalibrationError, match="what enters 0 holds NaN or infinity") as caught:
        find_scales(block)
    assert "calibrate with others" in caught.value.mend
    assert not block.module[0]._forward_pre_hooks.keys() - _hooks_of_rounding(block)


def _hooks_of_rounding(block):
    """The one hook that rounds."""
    return set(list(block.module[0]._forward_pre_hooks)[:1])


def test_scales_are_found_with_the_quantized_weights_at_work(make_block):
    block = make_block(two_layers(), [torch.randn(50, 8)], {"0": STATIC, "1": STATIC})
    halves = {name: layer.weight * 0.5 for name, layer in block.layers.items()}
    treated = {name: Treated(quantize(halves[name], STATIC, RTNConfig())) for name in halves}
    before = {name: layer.weight.clone() for name, layer in block.layers.items()}
    found = with_scales(block, treated, "minmax")
    assert all(torch.equal(block.layers[name].weight, weight) for name, weight in before.items())
    with quantized_weights(block, treated):
        assert torch.equal(block.layers["0"].weight, treated["0"].weight.dequantize())
        expected = find_scales(block, "minmax")
    assert all(torch.equal(block.layers[name].weight, weight) for name, weight in before.items())
    assert torch.equal(found["1"].acts.scale, expected["1"].scale)
    assert not torch.equal(found["1"].acts.scale, find_scales(block, "minmax")["1"].scale)
    assert list(roundings_of(block, found)) == ["0", "1"]


def test_weights_come_back_after_an_error(make_block):
    block = make_block(two_layers(), [torch.randn(5, 8)], {"0": STATIC})
    before = block.module[0].weight.clone()
    treated = {"0": Treated(quantize(torch.zeros(8, 8), STATIC, RTNConfig()))}
    with pytest.raises(RuntimeError), quantized_weights(block, treated):
        block.module(torch.randn(3, 7))  # does not fit
    assert torch.equal(block.module[0].weight, before)


@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_scales_of_every_step_beat_one_for_all(search, make_block):
    inputs = [torch.randn(20, 8) * size for size in (0.1, 1.0, 8.0)]
    errors = {}
    for scheme in (STATIC, PER_STEP):
        scheme = scheme.model_copy(update={"act_bits": 4})
        block = make_block(two_layers(), inputs, {"0": scheme})
        acts = find_scales(block, search)["0"]
        with block.rounding.instead({"0": rounding_of(scheme, block.module[0], acts)}):
            errors[scheme.act_mode] = [
                float((block.run(sighting)[0] - sighting.target[0]).square().sum()) for sighting in block.sightings
            ]
    for static, per_step in zip(errors["static"][:2], errors["per-step"][:2], strict=True):
        assert per_step < 0.2 * static
    assert len(set(acts.scale[:, 0].tolist())) >= 3
