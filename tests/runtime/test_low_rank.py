"""Linears with smoothing factors and a low-rank branch beside their integers."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from dacc.core.config import build_config
from dacc.core.errors import BundleError, ConfigError
from dacc.core.scheme import Scheme
from dacc.quant.grid import find_grid
from dacc.runtime import low_rank
from dacc.runtime.activation import ActivationScale, activation_shapes, round_static
from dacc.runtime.layers import LAYER_CLASSES, count_parameters, set_prefer_, swap_layers_
from dacc.runtime.low_rank import LOW_RANK_NAMES, low_rank_shapes
from dacc.runtime.weight import QuantizedWeight, state_shapes

BRANCH = {"rank": 4, "smooth": True}
DYNAMIC = {"act_bits": 8, "act_mode": "dynamic"}
GROUPED = {"bits": 4, "group_size": 16}
SCHEMES = [
    Scheme(**GROUPED, symmetric=False, **BRANCH),
    Scheme(bits=8, **BRANCH),
    Scheme(bits=4, rank=20),
    Scheme(bits=3, smooth=True),
    Scheme(bits=8, **DYNAMIC, **BRANCH),
    Scheme(bits=8, **DYNAMIC, smooth=True),
    Scheme(**GROUPED, two_level=True, **DYNAMIC, rank=1),
    Scheme(**GROUPED, two_level=True, act_bits=4, act_mode="dynamic", **BRANCH),
    Scheme(**GROUPED, act_bits=4, act_mode="per-group", act_group_size=16, **BRANCH),
    Scheme(bits=8, act_bits=6, act_mode="per-group", act_group_size=8, smooth=True),
    Scheme(**GROUPED, act_bits=4, act_mode="per-group", act_group_size=16, **BRANCH, shifted=True),
    Scheme(bits=8, act_bits=5, act_mode="dynamic", rank=3, shifted=True),
    Scheme(**GROUPED, two_level=True, act_bits=6, act_mode="dynamic", shifted=True),
    Scheme(bits=8, act_bits=8, act_mode="static", **BRANCH),
    Scheme(bits=8, act_bits=8, act_mode="static", split=16, **BRANCH),
]
EACH = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
PREFER = pytest.mark.parametrize("prefer", ["memory", "speed"])
SHAPE = (20, 48)


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def random_weight(scheme, shape=SHAPE):
    """A weight whose parts are all of about the same size."""
    grid = find_grid(torch.randn(shape), scheme, search=False)
    shapes = low_rank_shapes(scheme, shape)
    beside = {name: torch.randn(size).to(dtype) for name, (size, dtype) in shapes.items()}
    if scheme.smooth:
        beside["smoothing"] = (torch.rand(shape[1]) * 3 + 0.2).bfloat16().half()
    if scheme.shifted:
        beside["act_shift"] = torch.tensor([0.75])
    return replace(grid.pack(grid.nearest(torch.randn(shape)), shape), **beside)


def random_activation(scheme):
    shape = activation_shapes(scheme)["act_scale"][0]
    return ActivationScale(torch.full(shape, 0.05), torch.full(shape, 120, dtype=torch.uint8))


def made(scheme, plain=None):
    plain = plain or nn.Linear(48, 20)
    layer = LAYER_CLASSES[type(plain)](plain, scheme)
    layer.store_weight(random_weight(scheme))
    if scheme.has_fixed_acts:
        layer.store_activation(random_activation(scheme))
    return plain, layer, torch.randn(3, 7, 48)


def rounded(x, layer):
    """What is left of smoothed inputs once they are integers."""
    if layer.scheme.shifted:
        shift = layer.act_shift / (1 if layer.smoothing is None else layer.smoothing.float())
        groups = (x + shift).clamp(min=0).unflatten(-1, (-1, layer.scheme.act_group_size or x.shape[-1]))
        scale = groups.amax(-1, keepdim=True) / (2**layer.scheme.act_bits - 1)
        return ((groups / scale).round() * scale).flatten(-2) - shift
    if layer.scheme.act_mode == "static":
        return round_static(x, layer.act_scale[0, 0], layer.act_zero_point[0, 0], layer.scheme.act_bits)
    if layer.scheme.act_bits < 16:
        top = 2 ** (layer.scheme.act_bits - 1) - 1
        groups = x.unflatten(-1, (-1, layer.scheme.act_group_size or x.shape[-1]))
        scale = groups.abs().amax(-1, keepdim=True) / top
        return ((groups / scale).round() * scale).flatten(-2)
    return x


def reference(plain, layer, x):
    """The formula, in double precision: only the inputs of the integer product are rounded."""
    weight, x = layer.stored, x.float()
    x = x if weight.smoothing is None else x / weight.smoothing.float()
    y = rounded(x, layer).double() @ weight.residual().double().T
    if weight.low_rank_up is not None:
        y = y + x.double() @ weight.low_rank_down.double().T @ weight.low_rank_up.double().T
    return y if plain.bias is None else y + plain.bias.double()


def distance(found, expected):
    assert found.shape == expected.shape
    return float((found.double() - expected).norm() / expected.norm())


@EACH
@PREFER
def test_a_layer_computes_the_formula(scheme, prefer):
    for plain in (nn.Linear(48, 20), nn.Linear(48, 20, bias=False)):
        plain, layer, x = made(scheme, plain)
        set_prefer_(layer, prefer)
        for _ in range(2):
            assert distance(layer(x), reference(plain, layer, x)) < 5e-6


@EACH
@PREFER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_give_the_same_up_to_their_own_precision(scheme, prefer, dtype):
    plain, layer, x = made(scheme)
    layer.to(dtype)
    set_prefer_(layer, prefer)
    found = layer(x.to(dtype))
    assert found.dtype == dtype
    assert distance(found, reference(plain, layer, x.to(dtype))) < (0.05 if scheme.act_bits == 4 else 0.01)


@pytest.mark.parametrize("native", [True, False])
def test_a_branch_is_multiplied_in_float32_where_the_processor_emulates_bfloat16(native, monkeypatch):
    seen, linear = [], functional.linear

    def watched(x, weight):
        seen.append((x.dtype, weight.dtype))
        return linear(x, weight)

    monkeypatch.setattr(low_rank.functional, "linear", watched)
    monkeypatch.setattr(low_rank, "_BFLOAT16_ON_CPU", native)
    x, down, up = torch.randn(3, 16), torch.randn(4, 16).half(), torch.randn(8, 4).half()
    y = torch.randn(3, 8)
    found = low_rank.add_low_rank(y.bfloat16(), x.bfloat16(), down, up)
    assert found.dtype == torch.bfloat16
    assert set(seen) == {(torch.bfloat16 if native else torch.float32,) * 2}
    expected = y.bfloat16().double() + x.bfloat16().double() @ down.double().T @ up.double().T
    assert distance(found, expected) < 0.01
    assert low_rank.add_low_rank(y, x, down, up).dtype == torch.float32


@EACH
def test_the_weight_is_the_whole_one(scheme):
    plain, layer, x = made(scheme)
    weight = layer.stored
    expected = weight.residual().double()
    if scheme.rank:
        expected = expected + weight.low_rank_up.double() @ weight.low_rank_down.double()
    if scheme.smooth:
        expected = expected / weight.smoothing.double()
    torch.testing.assert_close(layer.weight, expected.float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(weight.dequantize(), layer.weight)
    if scheme.act_bits == 16:
        assert distance(layer(x), functional.linear(x, layer.weight, plain.bias).double()) < 5e-6


@EACH
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casting_never_touches_what_is_stored(scheme, cast):
    layer = made(scheme)[1]
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    getattr(layer, cast)()
    assert set(before) == {*state_shapes(scheme, SHAPE), *activation_shapes(scheme), "bias"}
    for name, tensor in layer.state_dict().items():
        if name != "bias":
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])
    assert layer.weight.dtype == layer.bias.dtype


@EACH
def test_the_state_comes_back_bit_for_bit_into_a_layer_that_has_already_run(scheme):
    _, layer, x = made(scheme)
    other = made(scheme)[1]
    set_prefer_(other, "speed")
    other(x)
    set_prefer_(layer, "speed")
    other.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    assert torch.equal(other(x), layer(x))
    again = QuantizedWeight(scheme, SHAPE, **layer.stored.tensors())
    assert torch.equal(again.dequantize(), layer.weight)


@EACH
@PREFER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_code_gives_the_same(scheme, prefer, dtype):
    torch.compiler.reset()
    _, layer, x = made(scheme)
    layer, x = layer.to(dtype), x.to(dtype)
    set_prefer_(layer, prefer)
    if scheme.has_fixed_acts:
        layer.row_sums()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    expected = layer(x).double()
    assert distance(compiled(x), expected) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_gradients_reach_the_input():
    plain, layer, x = made(SCHEMES[0])
    with torch.enable_grad():
        layer(x.requires_grad_()).sum().backward()
    expected = functional.linear(torch.ones(3, 7, 20), layer.weight.T)
    assert distance(x.grad, expected.double()) < 1e-5
    assert plain.weight.grad is None


def test_what_a_shift_adds_is_taken_off_again_when_another_weight_comes():
    scheme = next(scheme for scheme in SCHEMES if scheme.shifted)
    plain, layer, x = made(scheme)
    layer(x)
    layer.store_weight(random_weight(scheme))
    assert distance(layer(x), reference(plain, layer, x)) < 5e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_after_the_first_call_gives_what_one_before_it_gives(dtype):
    scheme = next(scheme for scheme in SCHEMES if scheme.shifted)
    _, layer, x = made(scheme)
    other = copy.deepcopy(layer).to(dtype)
    layer(x)
    assert torch.equal(layer.to(dtype)(x.to(dtype)), other(x.to(dtype)))


@EACH
def test_every_byte_is_counted_and_no_parameter_twice(scheme):
    _, layer, _ = made(scheme)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in layer.state_dict().values())
    assert layer.memory_bytes() == stored
    beside = (48 * 2 if scheme.smooth else 0) + (scheme.rank or 0) * (20 + 48) * 2 + 4 * scheme.shifted
    shapes = low_rank_shapes(scheme, SHAPE).values()
    assert sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes) == beside
    assert not low_rank_shapes(scheme.plain, SHAPE)
    assert count_parameters(nn.Sequential(layer)) == 20 * 48 + 20


@pytest.mark.parametrize(
    ("layer", "fields", "advice"),
    [
        (nn.Conv2d(8, 8, 1), {"bits": 8, "rank": 2}, "Only linears have a low-rank branch"),
        (nn.Conv1d(8, 8, 1), {"bits": 8, "smooth": True}, "2-D convolutions without groups"),
        (nn.Conv2d(8, 8, 1, groups=2), {"bits": 8, "smooth": True}, "2-D convolutions without groups"),
        (nn.Embedding(8, 8), {"bits": 8, "rank": 2}, "Only linears"),
        (nn.Conv2d(8, 8, 1), {"bits": 8, "act_bits": 4, "act_mode": "dynamic", "shifted": True}, "Only linears shift"),
        (nn.Linear(8, 6), {"bits": 8, "rank": 7}, "at most 6"),
    ],
)
def test_a_scheme_that_does_not_fit_a_layer_is_refused(layer, fields, advice):
    with pytest.raises(ConfigError, match=advice):
        swap_layers_(nn.Sequential(layer), {"0": build_config(Scheme, **fields)})


# in a bundle


LAYERS = {
    "transformer_blocks.0.attn1.to_q": Scheme(
        **GROUPED, act_bits=4, act_mode="per-group", act_group_size=16, **BRANCH, shifted=True
    ),
    "transformer_blocks.0.ff.net.2": SCHEMES[4],
    "transformer_blocks.1.ff.net.2": Scheme(bits=4, rank=3),
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def component(dit_folder, tmp_path):
    """A transformer with branches, written by hand; the factors of one lie beyond the range of float16."""
    model = DiTTransformer2DModel.from_pretrained(dit_folder, subfolder="transformer")
    swap_layers_(model, LAYERS)
    for name, scheme in LAYERS.items():
        layer = model.get_submodule(name)
        layer.store_weight(random_weight(scheme, layer.weight_shape))
    wide = model.get_submodule("transformer_blocks.1.ff.net.2")
    wide.store("low_rank_up", 1e5 + wide.low_rank_up.float())
    config = json.loads((dit_folder / "transformer" / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "dacc",
        "format": 1,
        "schemes": {scheme.name: scheme.model_dump(mode="json") for scheme in LAYERS.values()},
        "modules": {name: scheme.name for name, scheme in LAYERS.items()},
    }
    folder = tmp_path / "branches"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_saves_the_same_bytes(component, tmp_path, dtype):
    before = load_file(component / WEIGHTS)
    DiTTransformer2DModel.from_pretrained(component, dtype=dtype).save_pretrained(tmp_path / "again")
    after = load_file(tmp_path / "again" / WEIGHTS)
    assert before.keys() == after.keys()
    stored = [key for key in before if key.endswith(("qweight", "scale", "zero_point", *LOW_RANK_NAMES))]
    assert len(stored) == 6 + 5 + 4
    for key in stored:
        assert after[key].dtype == before[key].dtype
        assert torch.equal(after[key], before[key])
    assert before["transformer_blocks.1.ff.net.2.low_rank_up"].dtype == torch.float32
    if dtype == torch.float32:
        assert (tmp_path / "again" / WEIGHTS).read_bytes() == (component / WEIGHTS).read_bytes()


@pytest.mark.parametrize("leaf", LOW_RANK_NAMES)
def test_a_wrong_shape_and_a_missing_tensor_are_named(component, leaf):
    key, weights = f"transformer_blocks.0.attn1.to_q.{leaf}", load_file(component / WEIGHTS)
    save_file({**weights, key: weights[key][..., 1:].contiguous()}, component / WEIGHTS)
    with pytest.raises(BundleError, match=rf"{key} has shape \(.*\); its scheme needs \(.*\)"):
        DiTTransformer2DModel.from_pretrained(component)
    save_file({name: tensor for name, tensor in weights.items() if name != key}, component / WEIGHTS)
    with pytest.raises(BundleError, match=f"missing {key}"):
        DiTTransformer2DModel.from_pretrained(component)


def test_dequantizing_gives_plain_layers_with_the_whole_weight(component):
    model = DiTTransformer2DModel.from_pretrained(component)
    expected = {name: model.get_submodule(name).weight for name in LAYERS}
    plain = model.dequantize()
    for name, weight in expected.items():
        assert type(plain.get_submodule(name)) is nn.Linear
        assert torch.equal(plain.get_submodule(name).weight, weight)
