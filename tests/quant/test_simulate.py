import copy

import pytest
import torch
from torch import nn

from dacc.core.scheme import Scheme
from dacc.quant.grams import Grams
from dacc.quant.methods.rtn import RTNConfig, quantize
from dacc.quant.simulate import RoundedInputs, put_weight_, round_dynamic
from dacc.runtime.layers import swap_layers_

DYNAMIC = {"act_mode": "dynamic"}
W8A8 = Scheme(bits=8, act_bits=8, **DYNAMIC)
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


def rounded(model, scheme):
    """A network whose only layer computes as quantized, in float."""
    model = copy.deepcopy(model)
    RoundedInputs(model, {"0": scheme}).switch_on("0")
    put_weight_(model[0], quantize(model[0].weight, scheme, RTNConfig()))
    return model


def integer(model, scheme):
    """The same with the layer that runs on integers."""
    weight, model = quantize(model[0].weight, scheme, RTNConfig()), copy.deepcopy(model)
    swap_layers_(model, {"0": scheme})
    model[0].store_weight(weight)
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
    torch.testing.assert_close(round_dynamic(x, qmax, per_sample=per_sample), (x / step).round() * step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_sample", [False, True])
def test_layout_and_type_of_an_input_stay(dtype, per_sample):
    x = make("3x3")[1].to(dtype)
    expected = round_dynamic(x, 127, per_sample=per_sample)
    turned = x.movedim(1, -1).contiguous().movedim(-1, 1)  # channels last in memory
    found = round_dynamic(turned, 127, per_sample=per_sample)
    assert torch.equal(found, expected)
    assert (found.dtype, found.shape) == (dtype, x.shape)


def test_zeros_stay_zeros_and_rounding_twice_is_rounding_once():
    x = make("linear")[1]
    x[0] = 0
    once = round_dynamic(x, 127, per_sample=False)
    assert torch.equal(once[0], x[0])
    torch.testing.assert_close(round_dynamic(once, 127, per_sample=False), once, rtol=1e-6, atol=0)


@EACH
def test_nothing_happens_before_a_layer_is_switched_on(kind):
    model, x = make(kind)
    expected, before = model(x), x.clone()
    inputs = RoundedInputs(model, {"0": W8A8})
    assert torch.equal(model(x), expected)
    inputs.switch_on("0")
    assert not torch.equal(model(x), expected)
    assert torch.equal(x, before)


def test_layers_are_switched_on_one_by_one_and_weight_only_ones_never():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)).requires_grad_(False)
    inputs = RoundedInputs(model, {"0": W8A8, "1": Scheme(bits=4, group_size=8), "2": W8A8})
    x = torch.randn(5, 16)
    inputs.switch_on("1")
    expected = model[1](model[0](x))
    assert torch.equal(model(x), model[2](expected))
    inputs.switch_on("2")
    torch.testing.assert_close(
        model(x), nn.functional.linear(round_dynamic(expected, 127, per_sample=False), model[2].weight, model[2].bias)
    )


def test_statistics_are_of_the_rounded_inputs():
    model, x = make("linear")
    RoundedInputs(model, {"0": W8A8}).switch_on("0")
    with Grams({"0": model[0]}, rows_per_call=100) as grams:
        model(x)
    rows = round_dynamic(x, 127, per_sample=False).flatten(0, 1)
    torch.testing.assert_close(grams.mean("0"), rows.T @ rows / len(rows))


def test_a_weight_is_put_in_the_type_of_its_layer():
    layer = nn.Conv2d(4, 6, 3).to(torch.bfloat16)
    weight = quantize(layer.weight.detach(), Scheme(bits=3), RTNConfig())
    address = layer.weight.data_ptr()
    put_weight_(layer, weight)
    assert torch.equal(layer.weight, weight.dequantize(torch.bfloat16))
    assert layer.weight.data_ptr() == address
