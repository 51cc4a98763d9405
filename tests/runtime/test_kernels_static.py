"""Products against fixed activation scales, compared with slow, obvious integer arithmetic."""

import threading

import pytest
import torch
from torch.nn import functional as F

from dacc.runtime import kernels_int8, kernels_round, kernels_static
from dacc.runtime.activation import quantize_static, round_static
from dacc.runtime.kernels_static import StaticInput, conv2d_int8_static, linear_int8_static

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # of the result
BITS = {"4 bits": (4, 0.5), "6 bits": (6, 0.1), "8 bits": (8, 0.03)}  # and a scale that clips a few values
CONVS = [
    ((12, 8, 3, 3), {"padding": (1, 1)}),
    ((12, 8, 3, 3), {"stride": (2, 2)}),
    ((4, 8, 5, 3), {"padding": (4, 1), "dilation": (2, 1), "stride": (1, 2)}),
    ((8, 8, 1, 1), {}),
    ((8, 8, 1, 1), {"stride": (2, 2), "padding": (1, 0)}),
    ((8, 1, 3, 3), {"padding": (1, 1), "groups": 8}),
    ((16, 4, 3, 3), {"padding": (1, 1), "groups": 2}),
]


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def form(request, monkeypatch):
    if request.param == "functional":
        for module in (kernels_int8, kernels_round, kernels_static):
            monkeypatch.setattr(module, "may_use_scratch", lambda _: False)
    return request.param


FORMS = pytest.mark.parametrize("form", ["in place", "functional"], indirect=True)
ZEROS = pytest.mark.parametrize("zero", [0.0, 0.45, 1.0])  # where the zero point lies between its extremes


def made(shape, bits, zero):
    """Integer weight rows of a float weight's shape, their scale and a way to round what enters."""
    bits, scale = BITS[bits]
    weight = torch.randint(-128, 128, (shape[0], torch.Size(shape[1:]).numel()), dtype=torch.int8)
    zero_point = torch.tensor(round(zero * (2**bits - 1)), dtype=torch.uint8)
    act = StaticInput(torch.tensor(scale), zero_point, weight.sum(1, dtype=torch.int32), bits)
    return weight, torch.rand(shape[0]) * 0.1, act


def steps_from_zero(x, act):
    """(q - z) as int64, so that it times the scale is the rounded input."""
    return quantize_static(x, act.scale, act.zero_point, act.bits).long() - (int(act.zero_point) - 2 ** (act.bits - 1))


def scaled(sums, weight_scale, act, bias, shape=(-1,)):
    return sums.double() * act.scale.double() * weight_scale.double().view(shape) + bias.double().view(shape)


def error(result, expected):
    assert result.shape == expected.shape
    return float((result.double() - expected).norm() / expected.norm())


@FORMS
@ZEROS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_a_linear_equals_its_integer_formula(bits, dtype, zero, form):
    weight, scale, act = made((33, 65), bits, zero)
    x, bias = torch.randn(2, 20, 65).to(dtype), torch.randn(33).to(dtype)
    result = linear_int8_static(x, weight, scale, bias, act=act)
    assert result.dtype == dtype
    assert error(result, scaled(steps_from_zero(x, act) @ weight.long().t(), scale, act, bias)) < ROUNDING[dtype]


@FORMS
@ZEROS
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("shape", "options"), CONVS)
def test_a_convolution_equals_its_integer_formula(shape, options, bits, memory_format, zero, form):
    weight, scale, act = made(shape, bits, zero)
    x, bias = torch.randn(3, 8, 11, 9).to(memory_format=memory_format), torch.randn(shape[0])
    result = conv2d_int8_static(x, weight, scale, bias, act=act, kernel_size=shape[2:], **options)
    kernel = weight.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1).double()  # float64 sums of integers are exact
    sums = F.conv2d(steps_from_zero(x, act).double(), kernel, **options)
    assert error(result, scaled(sums, scale, act, bias, (-1, 1, 1))) < 2e-6


@ZEROS
@pytest.mark.parametrize("bits", BITS)
def test_a_float_simulation_rounds_exactly_as_the_kernels_do(bits, zero):
    weight, scale, act = made((33, 65), bits, zero)
    x, bias = torch.randn(40, 65), torch.randn(33)
    simulated = round_static(x, act.scale, act.zero_point, act.bits).double()
    expected = F.linear(simulated, weight.double() * scale.double().view(-1, 1), bias.double())
    assert error(linear_int8_static(x, weight, scale, bias, act=act), expected) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_the_form_in_reused_memory_rounds_to_the_same_integers(bits, dtype):
    _, scale = BITS[bits]
    _, _, act = made((4, 16), bits, 0.4)
    x = torch.cat([torch.randn(50, 16), torch.arange(-400, 400).view(50, 16) * scale / 2]).to(dtype)  # and all ties
    found = torch.empty(x.shape, dtype=torch.int8)
    kernels_static._quantize_into(x, act, found)
    assert torch.equal(found, quantize_static(x, act.scale, act.zero_point, act.bits))


def test_blocks_do_not_change_the_result(monkeypatch):
    weight, scale, act = made((40, 64), "8 bits", 0.4)
    kernel, kernel_scale, kernel_act = made((12, 8, 3, 3), "8 bits", 0.4)
    x, image = torch.randn(50, 64), torch.randn(3, 8, 9, 10)

    def results():
        conv = conv2d_int8_static(image, kernel, kernel_scale, act=kernel_act, kernel_size=(3, 3), padding=(1, 1))
        return linear_int8_static(x.clone(), weight, scale, act=act), conv

    whole = results()
    for module, limit in ((kernels_static, "QUANTIZE"), (kernels_int8, "_PRODUCT"), (kernels_int8, "_PATCH")):
        monkeypatch.setattr(module, f"{limit}_BLOCK", 700)
    assert all(torch.equal(*pair) for pair in zip(results(), whole, strict=True))


def test_an_input_that_was_changed_or_meets_other_scales_is_rounded_anew():
    weight, scale, act = made((6, 16), "8 bits", 0.5)
    x = torch.randn(4, 16)
    for other in (act, StaticInput(act.scale * 2, act.zero_point, act.row_sums, 8)):
        for _ in range(2):
            expected = scaled(steps_from_zero(x, other) @ weight.long().t(), scale, other, torch.zeros(6))
            assert error(linear_int8_static(x, weight, scale, act=other), expected) < 2e-6
        x.mul_(0.5)


def test_strided_and_empty_inputs():
    weight, scale, act = made((6, 16), "8 bits", 0.5)
    x = torch.randn(16, 5)
    expected = linear_int8_static(x.t().contiguous(), weight, scale, act=act)
    assert torch.equal(linear_int8_static(x.t(), weight, scale, act=act), expected)
    wide = torch.randn(5, 40)
    expected = linear_int8_static(wide[:, 3:19].clone(), weight, scale, act=act)
    assert torch.equal(linear_int8_static(wide[:, 3:19], weight, scale, act=act), expected)
    assert linear_int8_static(torch.zeros(2, 0, 16), weight, scale, act=act).shape == (2, 0, 6)


def test_threads_do_not_share_work_memory():
    weight, scale, act = made((24, 48), "8 bits", 0.5)
    inputs = [torch.randn(30, 48) for _ in range(4)]
    expected = [linear_int8_static(x, weight, scale, act=act) for x in inputs]
    wrong = []

    def run(index):
        with torch.no_grad():
            for _ in range(50):
                if not torch.equal(linear_int8_static(inputs[index], weight, scale, act=act), expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
