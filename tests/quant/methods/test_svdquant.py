import json

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from torch import nn

import dacc
from dacc.core.config import build_config
from dacc.core.errors import ConfigError
from dacc.core.manifest import read_manifest
from dacc.core.scheme import Scheme
from dacc.quant.config import METHODS, QuantizeConfig
from dacc.quant.entering import Entering
from dacc.quant.grid import find_grid
from dacc.quant.methods import gptq, rtn
from dacc.quant.methods.svdquant import (
    CONFIG,
    SVDQuantConfig,
    branch_bits,
    check,
    find_smoothing,
    quantize,
    quantize_alone,
    quantize_group,
)
from dacc.quant.smoothing import ALWAYS, smoothings
from dacc.quant.take_apart import Layer, error_of, take_apart
from dacc.runtime.layers import QuantizedLayer, QuantizedLinear

DYNAMIC = {"act_mode": "dynamic"}
W4A4 = Scheme(bits=4, group_size=64, two_level=True, act_bits=4, **DYNAMIC)
W4A4_GROUPS = Scheme(bits=4, group_size=64, act_bits=4, act_mode="per-group", act_group_size=64)
W4A16 = Scheme(bits=4, group_size=64, symmetric=False)
SCHEMES = [
    W4A4,
    W4A4_GROUPS,
    Scheme(bits=4, group_size=64, two_level=True, act_bits=8, **DYNAMIC),
    W4A16,
    Scheme(format="nvfp4", bits=4, group_size=16),
    Scheme(bits=8, act_bits=8, **DYNAMIC),
]
NAMED = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)


def planted(rows=192, features=256, samples=2048, outliers=3):
    """A weight with a leading low-rank part, and inputs a few channels of which are 40 times as large."""
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(rows, features // 8, generator=generator)
    weight = thin @ torch.randn(features // 8, features, generator=generator) / features**0.5
    weight = weight + torch.randn(rows, features, generator=generator) / 2
    mixing = torch.eye(features) + 1.2 * torch.randn(features, features, generator=generator) / features**0.5
    x = torch.randn(2 * samples, features, generator=generator) @ mixing
    x[:, torch.randperm(features, generator=generator)[:outliers]] *= 40
    return weight / features**0.5, x


def entering(x):
    return Entering(x.abs().amax(0), float(x.min()), x.T @ x / len(x), x)


def held_out_error(weight, treated, x):
    """Of the outputs of the layer that runs."""
    layer = QuantizedLinear(nn.Linear(*reversed(weight.shape), bias=False), treated.weight.scheme)
    layer.store_weight(treated.weight)
    with torch.no_grad():
        return float((layer(x) - x @ weight.T).norm() / (x @ weight.T).norm())


def one(weight, x, scheme, **fields):
    return quantize_group({"layer": weight}, {"layer": scheme}, entering(x), SVDQuantConfig(**fields), 0)["layer"]


def slowly(weight, x, scheme, rank):
    """The method without refinement and GPTQ: all candidates in turn, fully decomposed in double precision."""
    top = 2 ** (scheme.act_bits - 1) - 1
    span, found = weight.abs().amax(0), []
    candidates = [(0.0, 0.0)] + [(step / 4, beta) for step in (1, 2, 3) for beta in (0.0, 1 - step / 4)]
    for alpha, beta in candidates:
        s = x.abs().amax(0) ** alpha / span**beta
        s = (s / s.log().mean().exp()).bfloat16().double()
        scaled, entering = weight.double() * s, x.double() / s
        u, d, v = torch.linalg.svd(scaled)
        up, down = (u[:, :rank] * d[:rank].sqrt()).half(), (d[:rank].sqrt()[:, None] * v[:rank]).half()
        residual = (scaled - up.double() @ down.double()).float()
        rounded = find_grid(residual, scheme, search=True).round(residual).double()
        integers = entering
        if scheme.act_bits < 16:
            groups = entering.unflatten(1, (-1, scheme.act_group_size or entering.shape[1]))
            step = groups.abs().amax(-1, keepdim=True) / top
            integers = ((groups / step).round() * step).flatten(1)
        y = integers @ rounded.T + entering @ down.double().T @ up.double().T
        wanted = x.double() @ weight.double().T
        found.append(float((y - wanted).norm() / wanted.norm()))
    return min(found)


@NAMED
@pytest.mark.parametrize("rank", [0, 6])
def test_formula_equals_a_slow_search_in_double_precision(scheme, rank):
    weight, x = planted(rows=40, features=128, samples=150)
    fields = {"rank": rank, "steps": 4, "finalists": 6, "refinements": 0, "gptq": False}
    found = one(weight, x, scheme, **fields)
    assert found.output_error == pytest.approx(slowly(weight, x, scheme, rank), rel=0.01)
    assert found.output_error == pytest.approx(held_out_error(weight, found, x), rel=1e-3)


def test_rank_is_strictly_ordered_on_planted_outliers():
    weight, x = planted()
    fitted, held_out = x.split(2048)
    chosen = {
        "rtn": rtn.quantize(weight, W4A4, rtn.RTNConfig(search="mse")),
        "smoothing only": one(weight, fitted, W4A4, rank=0, gptq=False).weight,
        **{f"rank {rank}": one(weight, fitted, W4A4, rank=rank, gptq=False).weight for rank in (8, 16, 32)},
        "gptq": one(weight, fitted, W4A4, rank=32).weight,
    }
    errors = {name: held_out_error(weight, Wrapped(found), held_out) for name, found in chosen.items()}
    assert list(errors.values()) == sorted(errors.values(), reverse=True)
    assert errors["smoothing only"] < 0.6 * errors["rtn"]
    assert errors["rank 8"] < 0.5 * errors["smoothing only"]
    assert errors["rank 16"] < 0.9 * errors["rank 8"]


@pytest.mark.parametrize("fields", [{"rank": 0}, {"rank": 8}, {"rank": 32}], ids=str)
def test_rank_of_scales_per_token_and_group_is_below_one_scale_per_token(fields):
    weight, x = planted()
    fitted, held_out = x.split(2048)
    per_token, per_group = (
        held_out_error(weight, one(weight, fitted, scheme, **fields), held_out) for scheme in (W4A4, W4A4_GROUPS)
    )
    assert per_group < 0.95 * per_token


@pytest.mark.parametrize("scheme", [W4A4, W4A4_GROUPS], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize(
    ("function", "shift"), [("relu", 0.0), ("gelu", 22 / 128), ("silu", 36 / 128), ("mish", 40 / 128)]
)
def test_rank_of_shifted_inputs_is_below_signed_ones_behind_an_activation_function(scheme, function, shift):
    weight, x = planted()
    fitted, held_out = getattr(torch.nn.functional, function)(x).split(2048)
    for fields in ({"rank": 0}, {"rank": 8}):
        moved, signed = (one(weight, fitted, scheme, shift=how, **fields) for how in (True, False))
        assert moved.weight.act_shift.item() == shift
        assert not signed.weight.scheme.shifted
        assert held_out_error(weight, moved, held_out) < 0.9 * held_out_error(weight, signed, held_out)


@pytest.mark.parametrize(
    ("scheme", "x"),
    [
        (W4A4, planted()[1]),  # far below 0
        (W4A4, 0.01 * planted()[1].clamp(-20, 20)),  # close to 0 on both sides: a shift would cost more than the sign
        (Scheme(bits=8, act_bits=8, **DYNAMIC), planted()[1].relu()),  # the integers would not fit 8 bits
        (W4A16, planted()[1].relu()),
    ],
)
def test_other_inputs_are_not_shifted(scheme, x):
    assert not one(planted()[0], x[:512], scheme, rank=0, gptq=False).weight.scheme.shifted


class Wrapped:
    def __init__(self, weight):
        self.weight = weight


@NAMED
def test_rank_is_below_rounding_to_nearest_in_every_format(scheme):
    weight, x = planted()
    fitted, held_out = x.split(2048)
    plain = held_out_error(weight, Wrapped(rtn.quantize(weight, scheme, rtn.RTNConfig(search="mse"))), held_out)
    for fields, share in (({"rank": 0, "gptq": False}, 0.9), ({"rank": 16, "gptq": False}, 0.2), ({"rank": 16}, 0.17)):
        assert held_out_error(weight, one(weight, fitted, scheme, **fields), held_out) < share * plain


def test_smoothing_is_chosen_with_the_branch_in_mind():
    weight, x = planted()
    layer = Layer.reading(x[:2048], weight, W4A4)
    absmax, config = layer.inputs.abs().amax(0), SVDQuantConfig()
    (without, _), (beside, least) = (find_smoothing([layer], absmax, rank, config, 0) for rank in (0, 16))
    assert not torch.equal(without, beside)
    assert least < 0.9 * error_of(layer, take_apart(layer, without, 16, 0))


@pytest.mark.parametrize("rank", [16, "auto"])
def test_factors_can_be_judged_without_the_branch(rank):
    weight, x = planted()
    without = find_smoothing([Layer.reading(x[:2048], weight, W4A4)], x[:2048].abs().amax(0), 0, SVDQuantConfig(), 0)[0]
    alone, beside = (one(weight, x[:2048], W4A4, rank=rank, joint=joint, gptq=False) for joint in (False, True))
    assert torch.equal(alone.weight.smoothing, without)
    assert alone.weight.scheme.rank
    assert beside.output_error < 0.95 * alone.output_error


@NAMED
def test_refining_is_never_worse_than_one_shot(scheme):
    weight, x = planted(rows=96, features=128)
    once, more = (one(weight, x, scheme, rank=8, refinements=count, gptq=False) for count in (0, 5))
    assert more.output_error <= once.output_error


@NAMED
def test_repeat_gives_the_same_bytes(scheme):
    weight, x = planted(rows=96, features=128)
    before = weight.clone(), x.clone()
    first, second = (one(weight, x, scheme, rank=8).weight.tensors() for _ in range(2))
    assert first.keys() == second.keys() >= {"low_rank_up", "low_rank_down", "smoothing"}
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(weight, before[0])
    assert torch.equal(x, before[1])


@NAMED
def test_a_layer_that_gains_nothing_keeps_its_nearest_rounding(scheme):
    weight = torch.zeros(16, 128)
    weight[:, ::2] = 105.0 if scheme.format == "nvfp4" else 127.0 * 7 * 15  # exact in the format
    x = torch.randn(100, 128, generator=torch.Generator().manual_seed(0)).sign()
    found = one(weight, x, scheme, rank=8)
    assert found.method == "rtn"
    assert found.weight.scheme == scheme
    assert torch.equal(found.weight.qweight, rtn.quantize(weight, scheme, rtn.RTNConfig(search="mse")).qweight)


def test_layers_of_a_group_share_their_smoothing_and_have_branches_of_their_own():
    weight, x = planted(rows=96, features=128)
    weights = {"q": weight, "k": weight.flip(0) * 0.3, "v": weight[:64] + 0.02}
    found = quantize_group(weights, dict.fromkeys(weights, W4A4), entering(x), SVDQuantConfig(rank=8), 0)
    assert list(found) == ["q", "k", "v"]
    assert torch.equal(found["q"].weight.smoothing, found["k"].weight.smoothing)
    assert torch.equal(found["q"].weight.smoothing, found["v"].weight.smoothing)
    assert found["v"].weight.low_rank_up.shape == (64, 8)
    assert not torch.equal(found["q"].weight.low_rank_down, found["k"].weight.low_rank_down)


def test_eight_bits_beside_float_inputs_are_almost_the_weight():
    weight, x = planted(rows=96, features=128)
    found = one(weight, x, Scheme(bits=8), rank=8)
    assert found.weight.scheme.name == "w8-r8-smooth"
    assert float((found.weight.dequantize() - weight).norm() / weight.norm()) < 1e-2
    assert found.output_error < 1e-3


@pytest.mark.parametrize("act_bits", [16, 8])
def test_a_branch_of_full_rank_is_the_weight_up_to_float16(act_bits):
    weight, x = planted(rows=40, features=128)
    acts = {"act_bits": 8, **DYNAMIC} if act_bits == 8 else {}
    found = one(weight, x, Scheme(bits=2, **acts), rank=1000)
    assert found.weight.scheme.rank == 40
    assert found.output_error < 1e-3
    assert float((found.weight.dequantize() - weight).norm() / weight.norm()) < 1e-3


# the rank that is chosen


def test_a_branch_is_taken_where_it_does_more_than_its_bytes_do_in_the_codes():
    weight, x = planted()
    assert one(weight, x[:2048], W4A4).weight.scheme.rank in (8, 16)
    plain = torch.randn(192, 256, generator=torch.Generator().manual_seed(1))
    calm = torch.randn(2048, 256, generator=torch.Generator().manual_seed(2))
    assert one(plain, calm, W4A16).weight.scheme.rank is None


def test_a_small_budget_allows_no_branch():
    weight, x = planted()
    assert one(weight, x[:2048], W4A4, budget=0.5).weight.scheme.rank is None


def test_bits_of_a_branch_are_counted_for_each_weight():
    layers = [Layer.reading(torch.zeros(1, 64), torch.zeros(rows, 64), W4A4) for rows in (4, 32)]
    assert branch_bits(layers, 0) == 0
    assert branch_bits(layers, 8) == pytest.approx(16 * (4 * (4 + 64) + 8 * (32 + 64)) / (36 * 64))


def test_no_smoothing_and_the_data_free_factors_are_always_compared(monkeypatch):
    weight, x = planted(rows=40, features=128, samples=150)
    layer, seen = Layer.reading(x, weight, W4A4), []
    monkeypatch.setattr(
        "dacc.quant.methods.svdquant.take_apart",
        lambda layer, smoothing, *rest, rough: (
            seen.append((smoothing, rough)) or take_apart(layer, smoothing, *rest, rough=rough)
        ),
    )
    find_smoothing([layer], x.abs().amax(0), 0, SVDQuantConfig(finalists=1), 0)
    expected = smoothings(x.abs().amax(0), [weight], 10)
    full = [smoothing for smoothing, rough in seen if not rough]
    assert len(full) == ALWAYS + 1
    assert full[0] is None
    assert torch.equal(full[1], expected[1])


# layers without a branch, and what is refused


def test_other_layers_are_treated_as_gptq_treats_them():
    weight, x = planted(rows=40, features=128)
    gram = entering(x).gram
    for config, expected in (
        (SVDQuantConfig(), gptq.quantize(weight, W4A16, gptq.GPTQConfig(), gram)),
        (SVDQuantConfig(gptq=False), rtn.quantize(weight, W4A16, rtn.RTNConfig(search="mse"))),
    ):
        assert torch.equal(quantize(weight, W4A16, config, gram).qweight, expected.qweight)


@pytest.mark.parametrize("mode", ["static", "per-step"])
def test_fixed_activation_scales_are_refused(mode):
    with pytest.raises(ConfigError, match=f"no {mode} activation scales.*Leave --act-mode out"):
        check(SVDQuantConfig(), 8, mode)
    check(SVDQuantConfig(), 8, "dynamic")
    check(SVDQuantConfig(), 16, "auto")


@pytest.mark.parametrize("fields", [{"rank": -1}, {"rank": "all"}, {"budget": 0}, {"steps": 1}, {"refinements": 11}])
def test_fields_out_of_range_are_refused(fields):
    (name,) = fields
    with pytest.raises(ConfigError, match=name):
        build_config(CONFIG, **fields)
    assert build_config(CONFIG, rank="32").rank == 32


# a whole pass

PASSES = [
    {"bits": 4, "act_bits": 4, "settings": {"rank": 8}},
    {"bits": 4, "act_bits": 4, "act_mode": "dynamic", "settings": {"rank": 8}},
    {"bits": 4, "act_bits": 5, "group_size": 16, "settings": {"rank": 0}},
    {"bits": 4, "settings": {"rank": 4}},
    {"format": "nvfp4", "settings": {"rank": 4}},
    {"bits": 8, "act_bits": 8},
]


@pytest.mark.parametrize("fields", PASSES, ids=["w4a4", "w4a4 per token", "w4a5", "w4a16", "nvfp4", "w8a8 auto"])
def test_round_trip_what_is_loaded_computes_as_the_network_that_simulated_it(
    fields, dit_folder, quantize_watched, simulation_gap
):
    done = quantize_watched(dit_folder, "svdquant", **fields)
    model = DiTTransformer2DModel.from_pretrained(done.bundle, subfolder="transformer")
    record = read_manifest(done.bundle).components["transformer"].quantization
    smooth = 0
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLayer):
            assert layer.scheme == record.schemes[record.modules[name].scheme]
            assert torch.equal(layer.stored.dequantize(), done.model.get_submodule(name).weight)
            smooth += layer.scheme.smooth
    assert smooth >= 8
    grouped = [layer for layer in model.modules() if isinstance(layer, QuantizedLayer) and layer.scheme.act_group_size]
    few = fields.get("act_bits", 16) < 8 and "act_mode" not in fields
    assert len(grouped) == (0 if not few else 12 if fields.get("group_size") else 2)
    assert simulation_gap(done, model) < 1e-4
    assert dacc.verify_bundle(done.bundle) == []


def test_round_trip_is_bit_for_bit(dit_folder, quantize_watched, tmp_path):
    done = quantize_watched(dit_folder, "svdquant", **PASSES[0])
    first = DiTTransformer2DModel.from_pretrained(done.bundle, subfolder="transformer")
    first.save_pretrained(tmp_path / "again")
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "again")
    stored = {key: value for key, value in first.state_dict().items() if "low_rank" in key or "smoothing" in key}
    assert stored
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in first.state_dict().items())
    config = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert any(scheme["rank"] == 8 and scheme["smooth"] for scheme in config["schemes"].values())


def test_roles_decide_which_layers_have_a_branch(dit_folder, quantize_watched):
    done = quantize_watched(dit_folder, "svdquant", **PASSES[0])
    modules = read_manifest(done.bundle).components["transformer"].quantization.modules
    schemes = {name: Scheme.from_name(record.scheme) for name, record in modules.items() if record.scheme}
    assert any(scheme.absorbs_outliers for scheme in schemes.values())
    for name, scheme in schemes.items():
        if "norm1" in name:  # embedders and modulation
            assert not scheme.absorbs_outliers
            assert scheme.act_bits == 16


def test_convolutions_of_a_unet_run_beside_linears_with_branches(unet_folder, quantize_watched, simulation_gap):
    done = quantize_watched(unet_folder, "svdquant", bits=4, act_bits=8, settings={"rank": 2})
    model = UNet2DModel.from_pretrained(done.bundle, subfolder="unet")
    absorbing = [layer for layer in model.modules() if isinstance(layer, QuantizedLayer) and layer.scheme.rank]
    assert absorbing
    assert all(isinstance(layer, nn.Linear) for layer in absorbing)
    assert simulation_gap(done, model) < 1e-4


# without data


def column_outliers(rows=192, features=256, size=40.0):
    """A weight some columns of which are larger, and inputs that know nothing of it."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(rows, features, generator=generator) / features**0.5
    weight[:, torch.randperm(features, generator=generator)[:6]] *= size
    return weight, torch.randn(512, features, generator=generator)


@NAMED
@pytest.mark.parametrize("fields", [{"rank": 16}, {"rank": "auto"}], ids=["rank 16", "rank auto"])
def test_without_data_columns_that_stick_out_are_kept_out_of_the_integers(scheme, fields):
    weight, x = column_outliers()
    plain = Wrapped(rtn.quantize(weight, scheme, rtn.RTNConfig(search="mse")))
    found = quantize_alone(weight, scheme, SVDQuantConfig(data_free=True, **fields), 0)
    assert found.method is None
    assert held_out_error(weight, found, x) < 0.7 * held_out_error(weight, plain, x)
    # a block of 16 floats keeps a column that sticks out from the others by itself: there is less to win
    share = 0.7 if scheme.format == "nvfp4" else 0.5
    before = float((plain.weight.dequantize() - weight).norm())
    assert float((found.weight.dequantize() - weight).norm()) < share * before


def test_without_data_factors_are_those_of_the_weight_or_none(monkeypatch):
    weight, _ = planted(rows=40, features=128)
    seen = []
    monkeypatch.setattr(
        "dacc.quant.methods.svdquant.find_smoothing",
        lambda layers, absmax, rank, config, seed: seen.append(config) or (None, 1.0),
    )
    quantize_alone(weight, W4A4, SVDQuantConfig(data_free=True, rank=4), 0)
    assert len(smoothings(torch.ones(128), [weight], seen[0].steps)) == ALWAYS
    assert not seen[0].gptq


def test_without_data_large_inputs_are_read_off_small_weights():
    weight, x = planted(rows=96, features=256, outliers=0)
    large = torch.ones(256)
    large[:5] = 4
    weight, x = 3 * weight / large, x * large  # the outputs are those of even channels
    plain = Wrapped(rtn.quantize(weight, W4A4, rtn.RTNConfig(search="mse")))
    found = quantize_alone(weight, W4A4, SVDQuantConfig(data_free=True, rank=0), 0)
    assert found.weight.smoothing is not None
    assert held_out_error(weight, found, x) < 0.9 * held_out_error(weight, plain, x)


def test_without_data_the_same_seed_gives_the_same_bytes():
    weight, _ = column_outliers(rows=96, features=128)
    config = SVDQuantConfig(data_free=True, rank=8)
    first, second = (quantize_alone(weight, W4A4, config, 5).weight.tensors() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_data_a_layer_that_gains_nothing_keeps_its_nearest_rounding():
    weight = torch.zeros(16, 128)
    weight[:, ::2] = 15.0  # exact in every format
    found = quantize_alone(weight, W4A16, SVDQuantConfig(data_free=True, rank=8), 0)
    assert found.method == "rtn"
    assert found.output_error is None


@pytest.mark.parametrize("setting", [True, "true"])
def test_without_data_no_set_is_made_and_a_notice_says_so(setting, dit_folder, tmp_path, monkeypatch):
    for place in (
        "dacc.calibrate.inputs.calibration_of",
        "dacc.quant.driver.load_float",
        "dacc.quant.driver.quantize_units",
    ):
        monkeypatch.setattr(place, lambda *_, **__: pytest.fail("it looks at inputs"))
    config = QuantizeConfig(
        bits=4, act_bits=8, method="svdquant", measure="never", settings={"rank": 4, "data_free": setting}
    )
    bundle = dacc.quantize_pipeline(dit_folder, config, output=tmp_path / "out", device="cpu")
    manifest = read_manifest(bundle)
    done = manifest.passes[-1]
    assert done.calibration is None
    assert [notice for notice in done.notices if "looks at weights alone" in notice]
    model = DiTTransformer2DModel.from_pretrained(bundle, subfolder="transformer")
    modules = manifest.components["transformer"].quantization.modules
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLayer)}
    assert {name: layer.scheme.name for name, layer in layers.items()} == {
        name: record.scheme for name, record in modules.items() if record.scheme
    }
    absorbing = [name for name, layer in layers.items() if layer.scheme.rank == 4]
    fallen = [name for name, record in modules.items() if record.method == "rtn"]
    assert absorbing
    assert not set(absorbing) & set(fallen)
    assert len([notice for notice in done.notices if "no better than rounding to nearest" in notice]) == bool(fallen)
    assert all(record.output_error is None for record in modules.values())
    assert dacc.verify_bundle(bundle) == []


def test_a_set_is_asked_for_unless_the_method_is_told_to_do_without():
    for settings, needed in (({}, True), ({"data_free": "false"}, True), ({"data_free": "1"}, False)):
        assert QuantizeConfig(method="svdquant", settings=settings).resolved().needs_calibration == needed
    assert not QuantizeConfig(method="svdquant", settings={"data_free": "maybe"}).resolved().is_data_free
    assert QuantizeConfig(method="gptq").resolved().needs_calibration


def test_it_is_a_method_of_groups_that_needs_calibration():
    assert METHODS.fact("svdquant", "UNIT") == "group"
    assert METHODS.fact("svdquant", "NEEDS") == ("grams",)
