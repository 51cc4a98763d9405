import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from dacc.core.schedule_id import ScheduleId
from dacc.core.scheme import Scheme
from dacc.quant.grams import Grams
from dacc.quant.methods.rtn import RTNConfig, quantize
from dacc.quant.simulate import (
    RoundedInputs,
    branch_of,
    put_weight_,
    round_dynamic,
    rounding_before,
    rounding_of,
    row_now,
)
from dacc.runtime.activation import ActivationScale
from dacc.runtime.clock import RunState, fixed_run
from dacc.runtime.layers import set_step_table_, swap_layers_
from dacc.runtime.low_rank import low_rank_shapes
from dacc.runtime.step_table import StepTable

DYNAMIC = {"act_mode": "dynamic"}
W8A8 = Scheme(bits=8, act_bits=8, **DYNAMIC)
DYNAMIC_8 = {"act_bits": 8, **DYNAMIC}
SCHEMES = [
    W8A8,
    Scheme(bits=4, group_size=16, two_level=True, act_bits=8, **DYNAMIC),
    Scheme(bits=4, act_bits=4, **DYNAMIC),
]
LAYERS = {
    "linear": (lambda: nn.Linear(48, 20), (2, 7, 48)),
    "linear on a matrix": (lambda: nn.Linear(48, 20, bias=False), (5, 48)),
    "linear on maps": (lambda: nn.Linear(48, 20), (2, 3, 4, 48)),
    "1x1": (lambda: nn.Conv2d(16, 6, 1), (2, 16, 9, 8)),
    "3x3": (lambda: nn.Conv2d(16, 6, 3, padding=1), (2, 16, 9, 8)),
    "stride": (lambda: nn.Conv2d(16, 6, 3, stride=2, dilation=2, padding=(2, 1)), (2, 16, 9, 8)),
    "same": (lambda: nn.Conv2d(16, 6, 3, padding="same"), (2, 16, 9, 8)),
    "reflect": (lambda: nn.Conv2d(16, 6, 3, padding=1, padding_mode="reflect"), (2, 16, 9, 8)),
    "circular": (lambda: nn.Conv2d(16, 6, 3, padding=1, padding_mode="circular"), (2, 16, 9, 8)),
}
EACH = pytest.mark.parametrize("kind", LAYERS)
NAMED = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)


def make(kind):
    """A network of one layer, and an input in which samples and tokens differ in size."""
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    sizes = torch.rand(*shape[:1], *[1] * (len(shape) - 1)) + torch.rand(*shape[:-1], 1)
    return nn.Sequential(build()).requires_grad_(False), torch.randn(shape) * sizes


def rounded(model, scheme, acts=None):
    """A network whose only layer computes as quantized, in float."""
    model = copy.deepcopy(model)
    RoundedInputs(model, {"0": scheme}).put("0", rounding_of(scheme, model[0], acts))
    put_weight_(model[0], quantize(model[0].weight, scheme, RTNConfig()))
    return model


def integer(model, scheme, acts=None):
    """The same with the layer that runs on integers."""
    weight, model = quantize(model[0].weight, scheme, RTNConfig()), copy.deepcopy(model)
    swap_layers_(model, {"0": scheme})
    model[0].store_weight(weight)
    if acts:
        model[0].store_activation(acts)
    if scheme.act_mode == "per-step":
        set_step_table_(model, StepTable(GRID))
    return model


@EACH
@NAMED
@torch.no_grad()
def test_a_float_layer_gives_what_the_integer_layer_gives(kind, scheme):
    model, x = make(kind)
    found, expected = rounded(model, scheme)(x), integer(model, scheme)(x)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert (found - model(x)).norm() > 1e-4 * expected.norm()


@pytest.mark.parametrize(("kind", "per_sample"), [("linear", False), ("3x3", True)])
@pytest.mark.parametrize("qmax", [127, 7])
def test_inputs_are_rounded_to_integers_of_their_token_or_sample(kind, per_sample, qmax):
    x = make(kind)[1]
    dims = (1, 2, 3) if per_sample else (-1,)
    step = x.abs().amax(dims, keepdim=True) / qmax
    scheme = Scheme(bits=8, act_bits=qmax.bit_length() + 1, act_mode="dynamic")
    torch.testing.assert_close(round_dynamic(x, scheme, per_sample=per_sample), (x / step).round() * step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_sample", [False, True])
def test_layout_and_type_of_an_input_stay(dtype, per_sample):
    x = make("3x3")[1].to(dtype)
    expected = round_dynamic(x, W8A8, per_sample=per_sample)
    turned = x.movedim(1, -1).contiguous().movedim(-1, 1)  # channels last in memory
    found = round_dynamic(turned, W8A8, per_sample=per_sample)
    assert torch.equal(found, expected)
    assert (found.dtype, found.shape) == (dtype, x.shape)


def test_zeros_stay_zeros_and_rounding_twice_is_rounding_once():
    x = make("linear")[1]
    x[0] = 0
    once = round_dynamic(x, W8A8, per_sample=False)
    assert torch.equal(once[0], x[0])
    torch.testing.assert_close(round_dynamic(once, W8A8, per_sample=False), once, rtol=1e-6, atol=0)


@EACH
def test_nothing_happens_before_a_way_of_rounding_is_put(kind):
    model, x = make(kind)
    expected, before = model(x), x.clone()
    inputs = RoundedInputs(model, {"0": W8A8})
    assert torch.equal(model(x), expected)
    inputs.put("0", rounding_of(W8A8, model[0], None))
    assert not torch.equal(model(x), expected)
    assert torch.equal(x, before)
    inputs.put("0", None)
    assert torch.equal(model(x), expected)


def test_layers_are_rounded_one_by_one_and_weight_only_ones_never():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)).requires_grad_(False)
    inputs = RoundedInputs(model, {"0": W8A8, "1": Scheme(bits=4, group_size=8), "2": W8A8})
    x = torch.randn(5, 16)
    assert rounding_of(Scheme(bits=4, group_size=8), model[1], None) is None
    inputs.put("1", rounding_of(W8A8, model[1], None))
    expected = model[1](model[0](x))
    assert torch.equal(model(x), model[2](expected))
    inputs.put("2", rounding_of(W8A8, model[2], None))
    torch.testing.assert_close(
        model(x), nn.functional.linear(round_dynamic(expected, W8A8, per_sample=False), model[2].weight, model[2].bias)
    )


def test_statistics_are_of_the_rounded_inputs():
    model, x = make("linear")
    RoundedInputs(model, {"0": W8A8}).put("0", rounding_of(W8A8, model[0], None))
    with Grams({"0": model[0]}, rows_per_call=100) as grams:
        model(x)
    rows = round_dynamic(x, W8A8, per_sample=False).flatten(0, 1)
    torch.testing.assert_close(grams.mean("0"), rows.T @ rows / len(rows))


def test_a_weight_is_put_in_the_type_of_its_layer():
    layer = nn.Conv2d(4, 6, 3).to(torch.bfloat16)
    weight = quantize(layer.weight.detach(), Scheme(bits=3), RTNConfig())
    address = layer.weight.data_ptr()
    put_weight_(layer, weight)
    assert torch.equal(layer.weight, weight.dequantize(torch.bfloat16))
    assert layer.weight.data_ptr() == address


# fixed scales and splits

SPLIT = 5
GRID = ScheduleId(scheduler="DDIMScheduler", config_sha256="", timesteps=(900.0, 899.0, 898.0))
FIXED = {
    "static": Scheme(bits=8, act_bits=8, act_mode="static"),
    "static a6": Scheme(bits=4, act_bits=6, act_mode="static"),
    "per-step": Scheme(bits=8, act_bits=8, act_mode="per-step", act_steps=3),
    "split dynamic": Scheme(bits=8, split=SPLIT, **DYNAMIC_8),
    "split static": Scheme(bits=8, act_bits=8, act_mode="static", split=SPLIT),
    "split per-step": Scheme(bits=4, act_bits=8, act_mode="per-step", act_steps=3, split=SPLIT),
}


def table(scheme):
    """Scales that differ from row to row and from part to part."""
    if scheme.finds_acts:
        return None
    shape = ((scheme.act_steps or 0) + 1, scheme.parts)
    sizes = 1 + torch.arange(shape[0] * shape[1]).view(shape) / 3
    return ActivationScale(0.02 * sizes, (100 - 7 * sizes).to(torch.uint8) >> (8 - scheme.act_bits))


def at(call, calls=3):
    return fixed_run(RunState(run=1, call=call, calls=calls, step=call, steps=calls, timestep=900.0 - call, sigma=None))


WHOLE = ["linear", "linear on maps", "1x1", "3x3", "stride", "reflect"]


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [(kind, scheme) for scheme in FIXED.values() for kind in (WHOLE[:3] if scheme.split else WHOLE)],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
@torch.no_grad()
def test_fixed_scales_and_splits_give_what_the_integer_layer_gives(kind, scheme):
    model, x = make(kind)
    acts = table(scheme)
    with at(1):
        found, expected = rounded(model, scheme, acts)(x), integer(model, scheme, acts)(x)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert (found - model(x)).norm() > 1e-4 * expected.norm()


GROUPED = [
    Scheme(bits=4, group_size=16, act_bits=4, act_mode="per-group", act_group_size=16),
    Scheme(bits=8, act_bits=6, act_mode="per-group", act_group_size=8, split=32),
]
ABSORBING = [
    *(scheme.model_copy(update={"rank": 5, "smooth": True}) for scheme in GROUPED),
    Scheme(bits=8, smooth=True, **DYNAMIC_8),
    Scheme(bits=4, act_bits=4, rank=5, **DYNAMIC),
    Scheme(bits=4, act_bits=4, rank=5, smooth=True, **DYNAMIC),
    Scheme(bits=8, act_bits=8, act_mode="static", rank=5, smooth=True),
    Scheme(bits=4, act_bits=4, shifted=True, **DYNAMIC),
    Scheme(bits=4, act_bits=4, rank=5, smooth=True, shifted=True, **DYNAMIC),
    GROUPED[0].model_copy(update={"rank": 5, "smooth": True, "shifted": True}),
]


@pytest.mark.parametrize("scheme", ABSORBING, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("kind", ["linear", "linear on a matrix", "linear on maps"])
@torch.no_grad()
def test_smoothing_and_a_low_rank_branch_give_what_the_integer_layer_gives(kind, scheme):
    model, x = make(kind)
    acts, shapes = table(scheme), low_rank_shapes(scheme, (20, 48))
    beside = {name: (torch.rand(shape) + 0.2).to(dtype) for name, (shape, dtype) in shapes.items()}
    weight = replace(quantize(model[0].weight, scheme, RTNConfig()), **beside)
    found, expected = copy.deepcopy(model), copy.deepcopy(model)
    inputs = RoundedInputs(found, {"0": scheme})
    put_weight_(found[0], weight)
    unrounded = found(x)
    inputs.put("0", rounding_before(weight, rounding_of(scheme, found[0], acts)), branch_of(weight))
    swap_layers_(expected, {"0": scheme})
    expected[0].store_weight(weight)
    if acts:
        expected[0].store_activation(acts)
    assert (found(x) - expected(x)).norm() < 1e-5 * expected(x).norm()
    assert (found(x) - unrounded).norm() > 1e-4 * unrounded.norm()
    with inputs.instead({"0": None}):
        assert torch.equal(found(x), unrounded)
    assert (branch_of(weight) is None) == (scheme.rank is None)


@pytest.mark.parametrize("scheme", GROUPED, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("kind", ["linear", "linear on a matrix", "linear on maps"])
@torch.no_grad()
def test_scales_per_group_give_what_the_integer_layer_gives(kind, scheme):
    model, x = make(kind)
    found, expected = rounded(model, scheme)(x), integer(model, scheme)(x)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    size = scheme.act_group_size
    groups = x.unflatten(-1, (-1, size))
    step = groups.abs().amax(-1, keepdim=True) / (2 ** (scheme.act_bits - 1) - 1)
    entering = rounding_of(scheme, model[0], None)(x)
    torch.testing.assert_close(entering, ((groups / step).round() * step).flatten(-2))
    assert not torch.allclose(
        entering, round_dynamic(x, scheme.model_copy(update={"act_group_size": None}), per_sample=False)
    )


@pytest.mark.parametrize("kind", ["linear", "3x3"])
@torch.no_grad()
def test_each_part_of_the_channels_is_rounded_by_itself(kind):
    scheme = FIXED["split static"]
    model, x = make(kind)
    acts, axis = table(scheme), 1 if kind == "3x3" else -1
    found = rounding_of(scheme, model[0], acts)(x)
    low, high = found.split([SPLIT, x.shape[axis] - SPLIT], dim=axis)
    first, second = x.split([SPLIT, x.shape[axis] - SPLIT], dim=axis)
    for part, values, number in ((low, first, 0), (high, second, 1)):
        step, zero = acts.scale[0, number], float(acts.zero_point[0, number])
        codes = ((values / step).round() + zero).clamp(0, 255)
        torch.testing.assert_close(part, (codes - zero) * step)


def test_a_step_table_is_read_at_the_row_of_the_call():
    scheme = FIXED["per-step"]
    model, x = make("linear")
    acts = table(scheme)
    rounding = rounding_of(scheme, model[0], acts)
    rows = [ActivationScale(acts.scale[row : row + 1], acts.zero_point[row : row + 1]) for row in range(4)]
    expected = [rounding_of(FIXED["static"], model[0], row)(x) for row in rows]
    for call in range(3):
        with at(call):
            assert row_now(4) == call
            assert torch.equal(rounding(x), expected[call])
    assert row_now(4) == 3  # outside of runs: the row of all calls
    assert torch.equal(rounding(x), expected[3])
    with at(7, calls=9):
        assert row_now(4) == 3


def test_rounding_lets_gradients_through():
    model, x = make("linear")
    for scheme in (W8A8, FIXED["static"]):
        leaf = x.clone().requires_grad_(True)
        found = rounding_of(scheme, model[0], table(scheme))(leaf)
        assert torch.equal(found.detach(), rounding_of(scheme, model[0], table(scheme))(x))
        found.sum().backward()
        assert torch.equal(leaf.grad, torch.ones_like(x))


def test_fixed_schemes_without_scales_are_a_mistake():
    with pytest.raises(ValueError, match="w8a8-static needs activation scales"):
        rounding_of(FIXED["static"], nn.Linear(8, 8), None)


def test_other_ways_hold_for_a_while_only_even_after_an_error():
    model, x = make("linear")
    inputs = RoundedInputs(model, {"0": W8A8})
    inputs.put("0", rounding_of(W8A8, model[0], None))
    usual = model(x)
    with inputs.instead({"0": None}):
        assert not torch.equal(model(x), usual)
    assert torch.equal(model(x), usual)
    with inputs.instead({"0": torch.zeros_like}):
        assert torch.equal(model(x), model[0].bias.expand_as(usual))
    with pytest.raises(RuntimeError), inputs.instead({"0": torch.zeros_like}):
        model(x[..., :3])
    assert torch.equal(model(x), usual)
