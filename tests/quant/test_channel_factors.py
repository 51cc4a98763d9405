"""Factors for the channels of what enters convolutions."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dacc.core.journal import Journal
from dacc.core.scheme import Scheme
from dacc.quant.block import Treated
from dacc.quant.channel_factors import Spans, channel_factors, expected_error
from dacc.quant.grams import Grams
from dacc.quant.layerwise import treat_layers
from dacc.quant.methods import gptq, svdquant
from dacc.quant.methods.gptq import GPTQConfig
from dacc.quant.methods.rtn import RTNConfig, quantize
from dacc.quant.methods.svdquant import SVDQuantConfig
from dacc.quant.ranges import dynamic_roundings
from dacc.quant.simulate import rounding_before, rounding_of
from dacc.runtime.kernels_round import quantize_rows
from dacc.runtime.layers import LAYER_CLASSES
from dacc.runtime.weight import to_rows

W8A8 = Scheme(bits=8, act_bits=8, act_mode="dynamic", act_offset=True, smooth=True)
SCHEMES = [
    W8A8,
    W8A8.model_copy(update={"act_offset": False}),
    Scheme(bits=4, group_size=16, two_level=True, act_bits=8, act_mode="dynamic", act_offset=True, smooth=True),
]
NAMED = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
FACTORS = torch.logspace(-1, 1, 16).bfloat16().half()


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def images(count=6):
    """Of 16 channels, one of them loud and one silent."""
    sizes = torch.rand(16, 1, 1) + 0.1
    sizes[3], sizes[5] = 40, 0
    return F.silu(torch.randn(count, 16, 9, 8)) * sizes


def seen(layer, x):
    with Grams({"0": layer}, rows_per_call=10**6) as grams, Spans({"0": layer}) as spans:
        layer(x)
    return grams.mean("0"), spans.of("0")


def error_of(layer, x, scheme, factors):
    """Of the outputs, weight and inputs rounded to nearest; in double precision."""
    weight, channels = layer.weight, (-1, 1, 1)
    factors = torch.ones(16) if factors is None else factors.float()
    rounded = quantize(weight * factors.view(channels), scheme.plain, RTNConfig(search="minmax")).dequantize()
    smooth = x / factors.view(channels)
    codes, scale, zero = quantize_rows(smooth.flatten(1), scheme.act_max, offset=scheme.act_offset)
    codes = codes if zero is None else codes - zero
    entering = (codes * scale).view(x.shape)
    y = layer._conv_forward(entering.double(), rounded.double(), layer.bias.double())
    return float((y - layer.double()(x.double())).square().sum(1).mean()), layer.float()


@pytest.mark.parametrize("build", [lambda: nn.Conv2d(16, 24, 1), lambda: nn.Conv2d(16, 24, 3)], ids=["1x1", "3x3"])
@pytest.mark.parametrize("factors", [None, FACTORS], ids=["ones", "factors"])
@NAMED
def test_the_expected_error_is_about_that_of_rounding_to_nearest(scheme, factors, build):
    layer, x = build(), images(40)
    gram, spans = seen(layer, x)
    expected = expected_error(to_rows(layer.weight), scheme, gram.diagonal(), spans, factors)
    assert expected == pytest.approx(error_of(layer, x, scheme, factors)[0], rel=0.5)


@NAMED
def test_the_factors_lower_the_error_on_other_images(scheme):
    layer = nn.Conv2d(16, 24, 3, padding=1)
    found = channel_factors(layer.weight, scheme, *seen(layer, images()))
    assert (found.shape, found.dtype) == ((16,), torch.float16)
    assert found[3] == found.max()
    x = images(20)
    assert error_of(layer, x, scheme, found)[0] < 0.5 * error_of(layer, x, scheme, None)[0]


def test_where_all_channels_are_alike_there_are_none():
    layer = nn.Conv2d(16, 24, 3)
    layer.weight.copy_(layer.weight.sign())
    x = torch.rand(4, 1, 9, 8).expand(4, 16, 9, 8).contiguous()
    assert channel_factors(layer.weight, W8A8, *seen(layer, x)) is None


def test_spans_are_those_of_every_image_in_the_order_in_which_they_come():
    layer, x, more = nn.Conv2d(16, 4, 1), images(3) + 2, images(2) - 5
    with Spans({"0": layer, "idle": nn.Conv2d(1, 1, 1)}) as spans:
        layer(x), layer(more)
    layer(images())  # seen no more
    every = torch.cat([x, more])
    assert torch.equal(spans.of("0"), torch.stack([every.amin((2, 3)).clamp(max=0), every.amax((2, 3)).clamp(min=0)]))
    assert spans.of("idle") is None


@NAMED
@pytest.mark.parametrize(
    "geometry",
    [{}, {"padding": 1, "stride": 2}, {"padding": "same", "padding_mode": "circular"}, {"dilation": 2, "padding": 2}],
    ids=str,
)
def test_a_layer_divides_its_inputs_and_its_weight_stays_whole(scheme, geometry):
    layer, x = nn.Conv2d(16, 24, 3, **geometry), images()
    weight = quantize(layer.weight * FACTORS.view(-1, 1, 1), scheme.plain, RTNConfig())
    weight = replace(weight, scheme=scheme, smoothing=FACTORS)
    torch.testing.assert_close(weight.dequantize(), weight.residual() / FACTORS.float().view(-1, 1, 1))
    integer = LAYER_CLASSES[nn.Conv2d](layer, scheme)
    integer.store_weight(weight)
    around = rounding_before(weight, rounding_of(scheme, layer, None), 1)
    smooth = x / FACTORS.float().view(-1, 1, 1)
    torch.testing.assert_close(around(x), rounding_of(scheme, layer, None)(smooth) * FACTORS.float().view(-1, 1, 1))
    expected = layer._conv_forward(around(x), weight.dequantize(), layer.bias)
    assert (integer(x) - expected).norm() < 1e-5 * expected.norm()
    half = integer.to(torch.bfloat16)(x.bfloat16())
    assert (half.float() - expected).norm() < 0.02 * expected.norm()
    assert integer.smoothing.dtype == torch.float16


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.idle = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))

    def forward(self, x):
        return self.second(F.silu(self.first(x)))


@pytest.fixture
def block(make_block):
    schemes = dict.fromkeys(("first", "second", "idle"), W8A8)
    return make_block(Convolutions(), [images() for _ in range(4)], schemes)


@pytest.mark.parametrize(
    ("method", "config"), [(gptq, GPTQConfig()), (svdquant, SVDQuantConfig())], ids=["gptq", "svdquant"]
)
def test_methods_of_layers_use_them(block, method, config):
    found = treat_layers(block, method, config)
    assert found["first"].weight.scheme == W8A8
    assert found["first"].weight.smoothing[3] > 3
    assert found["idle"].weight.scheme == W8A8.plain
    assert found["idle"].method == "rtn"
    again = treat_layers(block, method, config)
    for name in found:
        for key, tensor in found[name].tensors().items():
            assert torch.equal(tensor, again[name].tensors()[key])


def test_channels_that_would_be_lost_without_factors_get_them(make_block):
    sizes = torch.ones(16, 1, 1)
    sizes[8:] = 1 / 15  # below half a step of what the loud ones need
    layer = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    layer.weight.div_(sizes)  # and they count as much
    scheme = W8A8.model_copy(update={"act_bits": 4})
    block = make_block(nn.Sequential(layer), [torch.randn(4, 16, 12, 12) * sizes for _ in range(4)], {"0": scheme})
    with block.rounding.instead(dynamic_roundings(block)):
        weight = treat_layers(block, gptq, GPTQConfig())["0"].weight
    x = torch.randn(4, 16, 12, 12) * sizes
    found = layer._conv_forward(
        rounding_before(weight, rounding_of(weight.scheme, layer, None), 1)(x), weight.dequantize(), None
    )
    assert (found - layer(x)).norm() < 0.25 * layer(x).norm()


def test_a_treated_layer_is_kept_byte_for_byte(block, tmp_path):
    treated = treat_layers(block, gptq, GPTQConfig())["first"]
    journal = Journal(tmp_path / "units", "key")
    journal.open(resume=True)
    journal.save("first", treated.tensors(), {})
    stored = {name: tensor.load() for name, tensor in journal.tensors("first").items()}
    assert set(stored) == {"qweight", "scale", "smoothing"}
    again = Treated.from_tensors(stored, Scheme.from_name(treated.weight.scheme.name), (16, 16, 3, 3))
    assert torch.equal(again.weight.dequantize(), treated.weight.dequantize())
