"""PTQ4DM: thresholds against trying every one, ranges mixed batch by batch, and the pass from set to bundle."""

import pytest
import torch

from dacc import QuantizeConfig, load, quantize_pipeline
from dacc.core.config import build_config
from dacc.core.errors import ConfigError
from dacc.core.scheme import Scheme
from dacc.quant.methods import rtn
from dacc.quant.methods.ptq4dm import CONFIG, PTQ4DMConfig, act_search, mixed_range, quantize
from dacc.quant.ranges import Observed, scale_of
from dacc.runtime.packing import unpack_codes
from dacc.runtime.weight import to_rows

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 inside diffusers

SCHEMES = [
    Scheme(bits=8),
    Scheme(bits=4),
    Scheme(bits=3, group_size=16),
    Scheme(bits=4, group_size=16, symmetric=False),
]
STATIC = Scheme(bits=8, act_bits=8, act_mode="static")


def example(rows=4, features=48):
    weight = torch.randn(rows, features, generator=torch.Generator().manual_seed(0))
    weight[0, 3] = 6.0
    return weight


def slow_threshold(values, bits):
    """Scale of the best of a hundred thresholds."""
    low, high, best = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, None
    peak = float(values.abs().max())
    for number in range(1, 101):
        scale = peak * number / 100 / high
        rounded = scale * (values.double() / scale).round().clamp(low, high)
        error = float((rounded - values.double()).abs().pow(2.4).mean())
        if best is None or error < best[0]:
            best = error, scale
    return best


@pytest.mark.parametrize("scheme", SCHEMES[:3], ids=lambda scheme: scheme.name)
def test_formula_equals_trying_every_threshold(scheme):
    weight = example()
    found = quantize(weight, scheme, PTQ4DMConfig())
    size = scheme.group_size or 48
    for row in range(4):
        for group in range(48 // size):
            values = weight[row, group * size : (group + 1) * size]
            error, scale = slow_threshold(values, scheme.bits)
            mine = found.dequantize()[row, group * size : (group + 1) * size]
            assert float((mine - values).abs().double().pow(2.4).mean()) == pytest.approx(error, rel=3e-2)
            assert float(found.scale[row, group]) == pytest.approx(scale, rel=2e-3)  # float16


def slow_grid(values, bits):
    """Error, scale and zero point of the best of a hundred ranges whose ends shrink together."""
    low, high, best = min(0.0, float(values.min())), max(0.0, float(values.max())), None
    for number in range(1, 101):
        scale = (high - low) * number / 100 / (2**bits - 1)
        zero = round(-low * number / 100 / scale)
        codes = ((values.double() / scale).round() + zero).clamp(0, 2**bits - 1)
        error = float(((codes - zero) * scale - values.double()).abs().pow(2.4).mean())
        if best is None or error < best[0]:
            best = error, scale, zero
    return best


def test_formula_with_zero_points_equals_trying_every_range():
    weight = example() + 0.5
    found = quantize(weight, SCHEMES[3], PTQ4DMConfig())
    for row in range(4):
        for group in range(3):
            values = weight[row, group * 16 : (group + 1) * 16]
            error, scale, _ = slow_grid(values, 4)
            mine = found.dequantize()[row, group * 16 : (group + 1) * 16]
            assert float((mine - values).abs().double().pow(2.4).mean()) == pytest.approx(error, rel=3e-2)
            assert float(found.scale[row, group]) == pytest.approx(scale, rel=2e-3)  # float16


def test_formula_codes_are_the_nearest():
    weight = example()
    for scheme in SCHEMES:
        found = quantize(weight, scheme, PTQ4DMConfig())
        codes = unpack_codes(found.qweight, scheme.bits, 48, signed=scheme.symmetric).float()
        groups = found.scale.shape[1]
        scale = found.scale.float().repeat_interleave(48 // groups, 1)
        zero = 0 if found.zero_point is None else found.zero_point.float().repeat_interleave(48 // groups, 1)
        assert torch.equal(codes, ((weight / scale).round() + zero).clamp(*scheme.code_range))


def test_two_level_groups_share_the_scale_of_their_row():
    scheme = Scheme(bits=4, group_size=16, two_level=True, act_bits=8, act_mode="static")
    found = quantize(example(), scheme, PTQ4DMConfig())
    assert found.scale.shape == (4, 1)
    assert found.group_scale.shape == (4, 3)
    assert found.group_scale.max() == 15
    assert (found.dequantize() - example()).norm() < 0.15 * example().norm()


def test_a_convolution_and_zeros_are_rounded_too():
    kernel = torch.randn(4, 3, 3, 3)
    kernel[1] = 0
    found = quantize(kernel, Scheme(bits=4), PTQ4DMConfig())
    assert found.shape == (4, 3, 3, 3)
    assert not found.dequantize()[1].any()
    rows = quantize(to_rows(kernel), Scheme(bits=4), PTQ4DMConfig())
    assert torch.equal(found.qweight, rows.qweight)


@pytest.mark.parametrize("scheme", [Scheme(bits=4), Scheme(bits=3, group_size=16)], ids=lambda scheme: scheme.name)
def test_rank_is_below_minimum_and_maximum_by_its_own_norm(scheme):
    weight = example(rows=20)
    weight[:, 5] *= 4

    def error(quantized):
        return float((quantized.dequantize() - weight).abs().pow(2.4).mean())

    nearest = rtn.quantize(weight, scheme, rtn.RTNConfig(search="minmax"))
    assert error(quantize(weight, scheme, PTQ4DMConfig())) < 0.95 * error(nearest)


# activations


def seen(values):
    return Observed(values, float(values.min()), float(values.max()))


def slow_range(values, bits):
    """The best of a hundred symmetric or one-sided ranges."""
    peak, best = values.abs().max(), None
    for number in range(1, 101):
        low = float(-peak * number / 100) if values.min() < 0 else 0.0
        high = float(peak * number / 100) if values.max() > 0 else 0.0
        if low < 0 < high:
            high *= 1 - 2 ** (1 - bits)  # 0 is a code
        step = (torch.tensor(high) - torch.tensor(low)) / (2**bits - 1)
        zero = float((-torch.tensor(low) / step).round())  # of a range about 0 halfway between two integers
        codes = ((values.double() / step.double()).round() + zero).clamp(0, 2**bits - 1)
        error = float(((codes - zero) * step.double() - values.double()).abs().pow(2.4).mean())
        if best is None or error < best[0]:
            best = error, low, high
    return best[1:]


@pytest.mark.parametrize("sign", [0, 1, -1])
@pytest.mark.parametrize("bits", [4, 5])
def test_ranges_of_batches_are_searched_and_mixed_nine_to_one(sign, bits):
    torch.manual_seed(0)
    batches = [torch.randn(300) * size for size in (1.0, 4.0, 0.5)]
    batches = [sign * batch.abs() if sign else batch for batch in batches]
    order = torch.randperm(3, generator=torch.Generator().manual_seed(0)).tolist()
    low, high = slow_range(batches[order[0]], bits)
    for number in order[1:]:
        mine = slow_range(batches[number], bits)
        low, high = 0.9 * low + 0.1 * mine[0], 0.9 * high + 0.1 * mine[1]
    found = mixed_range([seen(batch) for batch in batches], bits)
    assert [float(end) for end in found] == pytest.approx([low, high], rel=1e-5)
    assert (float(found[0]) == 0) == (sign == 1)
    assert (float(found[1]) == 0) == (sign == -1)


def test_batches_of_all_steps_count_although_a_set_is_ordered_by_steps():
    sizes = torch.linspace(1, 10, 40)
    records = [(call, seen(size * torch.randn(200))) for call, size in enumerate(sizes.tolist())]
    searched = act_search(PTQ4DMConfig())
    ends = [scale_of(STATIC, [[record]], searched).scale for record in (records[0], records[-1])]
    found = scale_of(STATIC, [records], searched).scale
    assert 3 * float(ends[0]) < float(found) < 0.8 * float(ends[1])


# a pass


SETTINGS = {"bits": 8, "act_bits": 8, "measure": "never"}


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_round_trip_gives_the_network_that_was_observed(kind, request, quantize_watched):
    fields = {name: value for name, value in SETTINGS.items() if name != "measure"}
    done = quantize_watched(request.getfixturevalue(f"{kind}_folder"), "ptq4dm", **fields)
    pipe = load(done.bundle, device="cpu", dtype="float32")
    model = pipe.unet if kind == "unet" else pipe.transformer
    fixed = 0
    for name, acts in done.acts.items():
        layer = model.get_submodule(name)
        assert torch.equal(layer.weight, done.model.get_submodule(name).weight)
        if acts is not None:
            fixed += 1
            assert torch.equal(layer.act_scale, acts.scale)
            assert torch.equal(layer.act_zero_point, acts.zero_point)
            assert acts.scale.shape == (1, 1)
    assert fixed > 5


def test_repeat_gives_the_same_bytes(unet_folder, quantize_watched, files_of, tmp_path):
    done = quantize_watched(unet_folder, "ptq4dm", bits=8, act_bits=8)
    config = QuantizeConfig(method="ptq4dm", **SETTINGS)
    again = quantize_pipeline(unet_folder, config, calib=done.calibration, output=tmp_path / "again")
    assert files_of(again) == files_of(done.bundle)


def test_with_float_or_dynamic_activations_it_needs_no_set(unet_folder, tmp_path):
    config = QuantizeConfig(method="ptq4dm", bits=8, measure="never")
    assert not config.resolved().needs_calibration
    quantize_pipeline(unet_folder, config, output=tmp_path / "out")
    assert not (tmp_path / "cache").exists()


def test_it_has_no_fields_of_its_own():
    with pytest.raises(ConfigError, match="iterations"):
        build_config(CONFIG, iterations=3)
