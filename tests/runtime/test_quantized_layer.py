"""Layers with fixed activation scales, and layers whose input channels have two parts."""

import copy

import accelerate
import pytest
import torch
from torch import nn
from torch.nn import functional

from dacc.core.config import build_config
from dacc.core.errors import ConfigError
from dacc.core.schedule_id import ScheduleId
from dacc.core.scheme import Scheme
from dacc.runtime.activation import ActivationScale, activation_shapes, round_static
from dacc.runtime.clock import RunState, fixed_run
from dacc.runtime.layers import LAYER_CLASSES, set_prefer_, set_step_table_, swap_layers_
from dacc.runtime.step_table import StepTable
from dacc.runtime.weight import QuantizedWeight, state_shapes

STATIC = {"bits": 8, "act_bits": 8, "act_mode": "static"}
DYNAMIC = {"bits": 8, "act_bits": 8, "act_mode": "dynamic"}
TWO_LEVEL = {"bits": 4, "group_size": 8, "two_level": True}
LINEAR = (lambda: nn.Linear(48, 20), (2, 7, 48))
CONV = (lambda: nn.Conv2d(48, 6, 3, padding=1), (2, 48, 9, 8))
LAYERS = {
    "linear": LINEAR,
    "linear without bias": (lambda: nn.Linear(48, 20, bias=False), (5, 48)),
    "conv2d": CONV,
    "conv2d same": (lambda: nn.Conv2d(48, 6, 3, padding="same"), (2, 48, 9, 8)),
    "conv2d reflect": (lambda: nn.Conv2d(48, 6, 3, padding=1, padding_mode="reflect"), (2, 48, 9, 8)),
    "conv2d groups": (lambda: nn.Conv2d(48, 6, 3, stride=2, dilation=2, padding=(2, 1), groups=2), (2, 48, 9, 8)),
    "conv2d 1x1": (lambda: nn.Conv2d(48, 6, 1), (2, 48, 9, 8)),
    "conv2d 1x1 stride": (lambda: nn.Conv2d(48, 6, 1, stride=2, padding=1, bias=False), (2, 48, 9, 8)),
}
FIXED = [Scheme(**STATIC), Scheme(bits=4, act_bits=4, act_mode="static"), Scheme(**STATIC | TWO_LEVEL)]
SPLIT = [
    *(Scheme(**STATIC | {"act_bits": bits}, split=16) for bits in (4, 6, 8)),
    *(Scheme(**DYNAMIC | {"act_bits": bits}, split=16) for bits in (5, 7, 8)),
    Scheme(**DYNAMIC | {"bits": 5}, split=13),
    Scheme(**STATIC | TWO_LEVEL, split=16),
    Scheme(**DYNAMIC | TWO_LEVEL, split=32),
    Scheme(bits=8, split=16),
    Scheme(bits=4, symmetric=False, split=47),
    Scheme(bits=4, symmetric=False, group_size=8, split=16),
]
CASES = [(kind, scheme) for kind in LAYERS for scheme in FIXED]
CASES += [(kind, scheme) for kind in LAYERS if "linear" in kind or "1x1" in kind for scheme in SPLIT]
EACH_CASE = pytest.mark.parametrize(("kind", "scheme"), CASES, ids=[f"{kind} {scheme.name}" for kind, scheme in CASES])


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def random_weight(scheme, shape):
    shapes = state_shapes(scheme, shape)
    low, high = scheme.code_range
    return QuantizedWeight.from_codes(
        torch.randint(low, high + 1, (shape[0], torch.Size(shape[1:]).numel())),
        scheme,
        shape,
        scale=torch.rand(shapes["scale"][0]) * 0.1 + 0.01,
        zero_point=None if scheme.symmetric else torch.randint(0, high + 1, shapes["zero_point"][0]),
        group_scale=torch.randint(1, 16, shapes["group_scale"][0]) if scheme.two_level else None,
    )


def random_activation(scheme):
    """Scales for values of about 1 to 3; a zero point somewhere."""
    shape = activation_shapes(scheme)["act_scale"][0]
    scale = (torch.rand(shape) + 0.5) * 6 / 2**scheme.act_bits
    return ActivationScale(scale, torch.randint(0, 2**scheme.act_bits, shape).to(torch.uint8))


def made(kind, scheme):
    build, input_shape = LAYERS[kind]
    plain = build()
    layer = LAYER_CLASSES[type(plain)](plain, scheme)
    layer.store_weight(random_weight(scheme, tuple(plain.weight.shape)))
    if activation_shapes(scheme):
        layer.store_activation(random_activation(scheme))
    return plain, layer, torch.randn(input_shape)


def rounded(x, layer, row=0):
    """The input as the scheme rounds it, each part by itself."""
    scheme, axis = layer.scheme, -1 if isinstance(layer, nn.Linear) else 1
    if scheme.act_bits == 16:
        return x
    parts = x.tensor_split([scheme.split], axis) if scheme.split else [x]
    done = []
    for index, part in enumerate(parts):
        if scheme.act_mode == "dynamic":
            dims = (-1,) if axis == -1 else (1, 2, 3)
            absmax, top = part.abs().amax(dims, keepdim=True), 2 ** (scheme.act_bits - 1) - 1
            done.append((part * (top / absmax)).round() * (absmax / top))
        else:
            scale, zero_point = layer.act_scale[row, index], layer.act_zero_point[row, index]
            done.append(round_static(part, scale, zero_point, scheme.act_bits))
    return torch.cat(done, axis)


def reference(plain, layer, x, row=0):
    plain = copy.deepcopy(plain).double()
    plain.weight.data = layer.stored.dequantize().double()
    if getattr(plain, "padding_mode", "zeros") != "zeros":  # it pads first and rounds then, which is the same
        assert layer.scheme.act_mode == "static"
    return plain(rounded(x, layer, row).double())


def distance(found, expected):
    assert found.shape == expected.shape
    return float((found.double() - expected).norm() / expected.norm())


@EACH_CASE
@pytest.mark.parametrize("prefer", ["memory", "speed"])
def test_a_layer_multiplies_rounded_inputs_by_its_dequantized_weight(kind, scheme, prefer):
    plain, layer, x = made(kind, scheme)
    set_prefer_(layer, prefer)
    for _ in range(2):
        assert distance(layer(x), reference(plain, layer, x)) < 2e-6


@EACH_CASE
def test_in_a_narrow_dtype_only_the_result_is_rounded(kind, scheme):
    plain, layer, x = made(kind, scheme)
    x = x.bfloat16()
    found = layer.bfloat16()(x)
    assert found.dtype == torch.bfloat16
    if scheme.act_bits < 16:
        plain = plain.bfloat16()
        assert distance(found, reference(plain, layer, x.float())) < 4e-3


@pytest.mark.parametrize("scheme", [FIXED[0], SPLIT[0], SPLIT[6], SPLIT[9]], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casting_never_touches_what_is_stored(scheme, cast):
    layer = made("linear", scheme)[1]
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    getattr(layer, cast)()
    for name, tensor in layer.state_dict().items():
        if name != "bias":
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("scheme", [FIXED[0], SPLIT[0], SPLIT[7]], ids=lambda scheme: scheme.name)
def test_the_state_comes_back_bit_for_bit_into_a_layer_that_has_already_run(scheme):
    _, layer, x = made("linear", scheme)
    other = made("linear", scheme)[1]
    set_prefer_(other, "speed")
    other(x)
    other.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    assert set(other.state_dict()) == {*state_shapes(scheme, (20, 48)), *activation_shapes(scheme), "bias"}
    assert torch.equal(other(x), layer(x))


def test_new_tensors_replace_what_was_computed_from_old_ones():
    plain, layer, x = made("linear", FIXED[0])
    layer(x)
    layer.store_weight(random_weight(layer.scheme, (20, 48)))
    assert distance(layer(x), reference(plain, layer, x)) < 2e-6
    layer.store_activation(random_activation(layer.scheme))
    assert distance(layer(x), reference(plain, layer, x)) < 2e-6


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_stored_tensors_may_be_offloaded_one_layer_at_a_time(kind, ran, buffers):
    _, layer, x = made(kind, Scheme(**STATIC))
    other = copy.deepcopy(layer)
    wanted = layer(x)
    if ran:
        other(x)
    accelerate.cpu_offload(other, execution_device=torch.device("cpu"), offload_buffers=buffers)
    assert other.qweight.device.type == "meta"
    assert other.scale.device.type == ("meta" if buffers else "cpu")
    for _ in range(2):
        assert torch.equal(other(x), wanted)
    assert other.qweight.device.type == "meta"


def test_a_layer_that_ran_in_inference_mode_runs_outside_it():
    plain, layer, x = made("linear", FIXED[0])
    with torch.inference_mode():
        layer(x)
    with torch.enable_grad():
        found = layer(x.clone().requires_grad_()).detach()
    assert distance(found, reference(plain, layer, x)) < 2e-6


PER_STEP = Scheme(bits=8, act_bits=8, act_mode="per-step", act_steps=3, split=16)
SCHEDULE = ScheduleId(scheduler="DDIMScheduler", config_sha256="", timesteps=(900.0, 500.0, 100.0))
STATES = [RunState(1, call, 3, call, 3, SCHEDULE.timesteps[call], None) for call in range(3)]


@pytest.mark.parametrize("kind", ["linear", "conv2d 1x1"])
def test_each_call_takes_its_own_row(kind):
    plain, layer, x = made(kind, PER_STEP)
    set_step_table_(layer, StepTable(SCHEDULE))
    outputs = []
    for row, state in enumerate(STATES):
        with fixed_run(state):
            outputs.append(layer(x))
        assert distance(outputs[-1], reference(plain, layer, x, row)) < 2e-6
    with pytest.warns(UserWarning, match="fit all calls"):
        assert distance(layer(x), reference(plain, layer, x, 3)) < 2e-6
    assert not torch.equal(outputs[0], outputs[1])


def test_copies_of_a_model_share_a_table_of_their_own():
    model = nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 48))
    swap_layers_(model, {"0": PER_STEP, "1": PER_STEP}, steps=StepTable(SCHEDULE))
    other = copy.deepcopy(model)
    assert other[0].step_table is other[1].step_table
    assert other[0].step_table is not model[0].step_table
    (hook,) = other._forward_pre_hooks.values()
    assert hook.__self__ is other[0].step_table


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["one block", "the whole model"])
def test_compiled_code_follows_the_steps_without_compiling_again(whole):
    torch.compiler.reset()
    block, x = nn.Sequential(nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 48)), torch.randn(5, 48)
    model = nn.Sequential(block)
    swap_layers_(model, {"0.0": PER_STEP, "0.2": PER_STEP}, steps=StepTable(SCHEDULE))
    for layer in (block[0], block[2]):
        layer.store_weight(random_weight(PER_STEP, (48, 48)))
        layer.store_activation(random_activation(PER_STEP))
        layer.row_sums()
    expected = []
    for state in STATES:
        with fixed_run(state):
            expected.append(model(x))
    (model if whole else block).compile(fullgraph=not whole)
    for number, (state, output) in enumerate(zip(STATES, expected, strict=True)):
        with fixed_run(state), torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            torch.testing.assert_close(model(x), output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "fields", "advice"),
    [
        (nn.Conv2d(8, 8, 3), {"bits": 8, "split": 4}, "Only linears and 1x1 convolutions"),
        (nn.Conv2d(8, 8, 1, groups=2), {"bits": 8, "split": 4}, "Only linears and 1x1 convolutions"),
        (nn.Embedding(8, 8), {"bits": 8, "split": 4}, "Only linears and 1x1 convolutions"),
        (nn.Linear(8, 8), {"bits": 8, "split": 8}, "at least one channel"),
        (nn.Linear(10, 8), {"bits": 8, "split": 4, "group_size": 4}, "whole groups"),
        (nn.Conv1d(8, 8, 1), STATIC, "no integer product"),
        (nn.Embedding(8, 8), STATIC, "no integer product"),
    ],
)
def test_a_scheme_that_does_not_fit_a_layer_is_refused(layer, fields, advice):
    with pytest.raises(ConfigError, match=advice):
        swap_layers_(nn.Sequential(layer), {"0": build_config(Scheme, **fields)})


def test_a_static_layer_is_near_the_float_layer():
    plain, layer, x = made("linear", FIXED[0])
    low, high = x.min(), x.max()
    scale = (high - low) / 255
    zero_point = (-low / scale).round().to(torch.uint8)
    layer.store_activation(ActivationScale(scale.view(1, 1), zero_point.view(1, 1)))
    expected = functional.linear(x, layer.weight, plain.bias)
    assert distance(layer(x), expected.double()) < 1e-2
