"""The kernels against slow, obvious arithmetic in float64 and against the dequantized weight."""

import threading

import pytest
import torch
from torch.nn import functional as F

from dacc.core.scheme import Scheme
from dacc.runtime import kernels_int8, kernels_round
from dacc.runtime.kernels_int8 import conv2d_int8_dynamic, linear_int8_dynamic
from dacc.runtime.kernels_round import quantize_rows
from dacc.runtime.kernels_weight_only import float_weight, int8_rows, linear_weight_only
from dacc.runtime.weight import QuantizedWeight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # of weights, activations and results


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def random_weight(scheme: Scheme, shape: tuple[int, ...]) -> QuantizedWeight:
    rows, features = shape[0], torch.Size(shape[1:]).numel()
    groups = features // scheme.group_size if scheme.group_size else 1
    low, high = scheme.code_range
    if scheme.two_level:
        low = -high  # -8 * 15 would still fit; -8 * 16 is never made
    return QuantizedWeight.from_codes(
        torch.randint(low, high + 1, (rows, features)),
        scheme,
        shape,
        scale=(torch.rand(rows, 1 if scheme.two_level else groups) * 0.1 + 0.01).half(),
        zero_point=None if scheme.symmetric else torch.randint(0, high + 1, (rows, groups)),
        group_scale=torch.randint(1, 16, (rows, groups)) if scheme.two_level else None,
    )


def linear(x, weight, bias=None):
    if weight.scheme.act_bits == 16:
        return linear_weight_only(x, weight, bias)
    qmax = 2 ** (weight.scheme.act_bits - 1) - 1
    return linear_int8_dynamic(x, int8_rows(x, weight), weight.scale.view(-1), bias, qmax=qmax)


def conv2d(x, weight, bias=None, **options):
    if weight.scheme.act_bits == 16:
        return F.conv2d(x, float_weight(x, weight), bias, **options)
    rows, kernel_size = int8_rows(x, weight), weight.shape[2:]
    return conv2d_int8_dynamic(x, rows, weight.scale.view(-1), bias, kernel_size=kernel_size, **options)


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    assert result.shape == reference.shape
    return float((result.double() - reference).norm() / reference.norm().clamp_min(1e-30))


def fake_quantize(x: torch.Tensor, dims: tuple[int, ...], qmax: int) -> torch.Tensor:
    """What the integers of `x` stand for, with one scale over `dims`."""
    absmax = x.float().abs().amax(dims, keepdim=True)
    absmax[absmax == 0] = qmax
    return (x.float() * (qmax / absmax)).round().double() * (absmax / qmax).double()


def int8_linear_reference(x, weight, bias, qmax=127):
    return F.linear(fake_quantize(x, (-1,), qmax), weight.dequantize().double(), bias.double())


# --- linear, integer activations


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "features", "outputs"), [(1, 1, 1), (5, 7, 3), (33, 65, 17), (300, 128, 96)])
def test_int8_linear_equals_its_formula(dtype, rows, features, outputs):
    weight = random_weight(Scheme(bits=8, act_bits=8, act_mode="dynamic"), (outputs, features))
    x, bias = torch.randn(2, rows, features).to(dtype), torch.randn(outputs).to(dtype)
    result = linear(x, weight, bias)
    assert result.dtype == dtype
    assert relative_error(result, int8_linear_reference(x, weight, bias)) < ROUNDING[dtype]


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(bits=8, act_bits=4, act_mode="dynamic"),
        Scheme(bits=4, act_bits=8, act_mode="dynamic"),
        Scheme(bits=4, act_bits=8, act_mode="dynamic", group_size=13, two_level=True),
        Scheme(bits=3, act_bits=8, act_mode="dynamic", group_size=13, two_level=True),
    ],
    ids=lambda scheme: scheme.name,
)
def test_narrow_weights_and_activations_ride_the_int8_product(scheme):
    weight = random_weight(scheme, (33, 65))
    x, bias = torch.randn(3, 20, 65), torch.randn(33)
    reference = int8_linear_reference(x, weight, bias, qmax=2 ** (scheme.act_bits - 1) - 1)
    assert relative_error(linear(x, weight, bias), reference) < 2e-6


def test_blocks_do_not_change_the_integers(monkeypatch):
    weight = random_weight(Scheme(bits=8, act_bits=8, act_mode="dynamic"), (40, 64))
    x, image = torch.randn(50, 64), torch.randn(3, 8, 9, 10)
    conv_weight = random_weight(weight.scheme, (12, 8, 3, 3))
    whole = linear(x, weight), conv2d(image, conv_weight)
    for module, limit in ((kernels_round, "QUANTIZE"), (kernels_int8, "_PRODUCT"), (kernels_int8, "_PATCH")):
        monkeypatch.setattr(module, f"{limit}_BLOCK", 700)
    assert torch.equal(linear(x.clone(), weight), whole[0])
    assert torch.equal(conv2d(image, conv_weight), whole[1])


def test_traced_form_gives_the_same_integers_as_the_eager_one(monkeypatch):
    x = torch.randn(20, 64).bfloat16()
    eager = quantize_rows(x)
    image, weight = (
        torch.randn(2, 8, 9, 10),
        random_weight(Scheme(bits=8, act_bits=8, act_mode="dynamic"), (12, 8, 3, 3)),
    )
    eager_image = conv2d(image, weight, stride=(2, 2), padding=(1, 1))
    for module in (kernels_int8, kernels_round):
        monkeypatch.setattr(module, "may_use_scratch", lambda _: False)
    traced = quantize_rows(x)
    assert torch.equal(eager[0], traced[0])
    assert torch.equal(eager[1], traced[1])
    assert torch.equal(conv2d(image, weight, stride=(2, 2), padding=(1, 1)), eager_image)


def test_strided_zero_and_empty_inputs():
    weight = random_weight(Scheme(bits=8, act_bits=8, act_mode="dynamic"), (6, 16))
    x, bias = torch.randn(16, 9), torch.randn(6)
    assert torch.equal(linear(x.t(), weight, bias), linear(x.t().contiguous(), weight, bias))
    assert torch.equal(linear(torch.zeros(4, 16), weight, bias), bias.expand(4, 6))
    assert torch.equal(linear(torch.full((1, 16), 1e-40), weight, bias), bias.expand(1, 6))
    assert linear(torch.zeros(2, 0, 16), weight, bias).shape == (2, 0, 6)


def test_a_changed_tensor_is_quantized_anew():
    weight = random_weight(Scheme(bits=8, act_bits=8, act_mode="dynamic"), (6, 16))
    x = torch.randn(4, 16)
    first = linear(x, weight)
    assert torch.equal(linear(x, weight), first)
    x.mul_(2)
    assert torch.equal(linear(x, weight), first * 2)
    with torch.inference_mode():  # tensors made here carry no version
        y = x / 2
        assert torch.equal(linear(y, weight), first)
        y.mul_(2)
        assert torch.equal(linear(y, weight), first * 2)


def test_threads_do_not_share_work_memory():
    weight = random_weight(Scheme(bits=8, act_bits=8, act_mode="dynamic"), (24, 48))
    inputs = [torch.randn(30, 48) for _ in range(4)]
    expected = [linear(x, weight) for x in inputs]
    wrong: list[int] = []

    def run(index: int) -> None:
        with torch.no_grad():
            wrong.extend(index for _ in range(50) if not torch.equal(linear(inputs[index], weight), expected[index]))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_bias_that_asks_for_gradients_is_no_obstacle():
    scheme = Scheme(bits=8, act_bits=8, act_mode="dynamic")
    weight, conv_weight = random_weight(scheme, (6, 16)), random_weight(scheme, (6, 5, 3, 3))
    x, image, bias = torch.randn(4, 16), torch.randn(2, 5, 8, 8), torch.nn.Parameter(torch.randn(6))
    expected = linear(x, weight, bias), conv2d(image, conv_weight, bias)
    with torch.enable_grad():
        assert torch.equal(linear(x, weight, bias), expected[0])
        assert torch.equal(conv2d(image, conv_weight, bias), expected[1])


# --- convolution, integer activations


def int8_conv_reference(x, weight, bias, **options):
    return F.conv2d(fake_quantize(x, (1, 2, 3), 127), weight.dequantize().double(), bias.double(), **options)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((12, 8, 3, 3), {"padding": (1, 1)}),
        ((12, 8, 3, 3), {"stride": (2, 2)}),
        ((4, 8, 5, 3), {"padding": (4, 1), "dilation": (2, 1), "stride": (1, 2)}),
        ((8, 8, 1, 1), {}),
        ((8, 8, 1, 1), {"stride": (2, 2)}),
        ((8, 1, 3, 3), {"padding": (1, 1), "groups": 8}),
        ((16, 4, 3, 3), {"padding": (1, 1), "groups": 2}),
    ],
)
def test_int8_conv_equals_its_formula(shape, options, dtype, memory_format):
    weight = random_weight(Scheme(bits=8, act_bits=8, act_mode="dynamic"), shape)
    x, bias = torch.randn(3, 8, 11, 9).to(dtype).to(memory_format=memory_format), torch.randn(shape[0]).to(dtype)
    result = conv2d(x, weight, bias, **options)
    assert result.dtype == dtype
    assert relative_error(result, int8_conv_reference(x, weight, bias, **options)) < ROUNDING[dtype]


def test_a_sample_does_not_depend_on_its_batch_mates():
    weight = random_weight(Scheme(bits=8, act_bits=8, act_mode="dynamic"), (12, 8, 3, 3))
    x = torch.randn(3, 8, 10, 10)
    alone = conv2d(x[1:2], weight, padding=(1, 1))
    together = conv2d(x * torch.tensor([100.0, 1.0, 0.0]).view(3, 1, 1, 1), weight, padding=(1, 1))
    assert torch.equal(together[1:2], alone)
    assert not together[2].any()


# --- weight only


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("outputs", "features", "group_size"), [(64, 128, 32), (33, 65, 13), (5, 7, None), (6, 32, None)]
)
def test_weight_only_linear_equals_the_dequantized_product(dtype, bits, symmetric, outputs, features, group_size):
    weight = random_weight(Scheme(bits=bits, symmetric=symmetric, group_size=group_size), (outputs, features))
    x, bias = torch.randn(2, 20, features).to(dtype), torch.randn(outputs).to(dtype)
    for inputs in (x, x[:1, :3], x[:, 0], x[:0]):
        reference = F.linear(inputs.double(), weight.dequantize().double(), bias.double())
        assert relative_error(linear(inputs, weight, bias), reference) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "scheme", [Scheme(bits=4, group_size=9), Scheme(bits=8, symmetric=False)], ids=lambda s: s.name
)
def test_weight_only_conv_equals_the_dequantized_convolution(dtype, scheme):
    weight = random_weight(scheme, (6, 5, 3, 3))
    x, bias = torch.randn(2, 10, 8, 8).to(dtype), torch.randn(6).to(dtype)
    options = {"padding": (1, 1), "stride": (2, 1), "groups": 2}
    reference = F.conv2d(x.double(), weight.dequantize().double(), bias.double(), **options)
    assert relative_error(conv2d(x, weight, bias, **options), reference) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_layer_after_another_does_not_disturb_earlier_results(dtype):
    first, second = (random_weight(Scheme(bits=4, group_size=16), (24, 64)) for _ in range(2))
    x = torch.randn(40, 64).to(dtype)
    before = linear(x, first)
    kept = before.clone()
    linear(x, second)
    assert torch.equal(before, kept)
    assert torch.equal(linear(x, first), kept)


def test_gradients_reach_the_input_through_weight_only_layers():
    weight = random_weight(Scheme(bits=4, group_size=16), (24, 64))
    with torch.enable_grad():
        x = torch.randn(4, 64, requires_grad=True)
        y = linear(x, weight)
        linear(x, random_weight(weight.scheme, (24, 64)))
        y.sum().backward()
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(4, 64))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [Scheme(bits=8, act_bits=8, act_mode="dynamic"), Scheme(bits=4, group_size=16)])
def test_torch_compile_gives_the_same_result(scheme):
    weight, x = random_weight(scheme, (32, 64)), torch.randn(24, 64)
    compiled = torch.compile(lambda inputs: linear(inputs, weight), fullgraph=True)
    torch.testing.assert_close(compiled(x), linear(x, weight), rtol=1e-5, atol=1e-5)
