"""Nunchaku Lite: diffusers' own classes take the tensors, and a kernel would make of them what the bundle gives.

No kernel runs here: arithmetic in floats stands in for the two that diffusers calls, reading the packed tensors.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, NunchakuLiteQuantizationConfig
from safetensors.torch import load_file

from dacc.core.errors import UnsupportedError
from dacc.core.reporter import silent
from dacc.core.scheme import Scheme
from dacc.export import nunchaku_layout as layout
from dacc.export.api import export_pipeline
from dacc.export.config import ExportConfig
from dacc.runtime.nvfp4 import VALUES
from dacc.runtime.packing import unpack_codes

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "nunchaku-lite"
SVDQUANT = {
    "bits": 4,
    "act_bits": 4,
    "method": "svdquant",
    "settings": {"data_free": True, "rank": 8, "shift": False},
}


@pytest.fixture
def classes(monkeypatch):
    """diffusers' module of these layers, with arithmetic in place of the kernels that it would fetch."""
    fetched = types.ModuleType("kernels")
    fetched.get_kernel = lambda *_, **__: types.SimpleNamespace(ops=Kernels())
    monkeypatch.setitem(sys.modules, "kernels", fetched)
    monkeypatch.setattr("diffusers.utils.is_kernels_available", lambda: True)
    monkeypatch.setattr("diffusers.utils.is_kernels_version", lambda *_: True)
    monkeypatch.setattr("diffusers.utils.constants.DIFFUSERS_TRUST_REMOTE_KERNELS", True)
    name = "diffusers.quantizers.nunchaku.utils"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


class Kernels:
    """What the kernels compute, from the packed tensors."""

    def quantize_w4a4_act_fuse_lora(self, x, integers, scales, down, inner, smoothing, glu, floats):
        assert not glu
        entering = x.float() / layout.unpack_vector(smoothing).float()
        if not floats:  # the activations of 4-bit floats stay as they are here, as in the bundle
            groups = entering.unflatten(1, (-1, 64))
            step = groups.abs().amax(-1, keepdim=True) / 7
            entering = ((groups / step).round() * step).flatten(1)
        self.entering = entering
        inner[: len(x)] = x.float() @ layout.unpack_down(down).float().T

    def gemm_w4a4(self, integers, weight, output, *rest):
        scales, inner, up, bias, floats, whole = (rest[place] for place in (2, 5, 6, 12, 19, 20))
        shape = (weight.shape[0], 2 * weight.shape[1])
        codes = layout.unpack_codes(weight, shape)
        if floats:
            values, step = VALUES[codes.int()], layout.unpack_micro_scales(scales.view(torch.uint8))
            step = step.view(torch.float8_e4m3fn).float() * whole.float()
        else:
            values, step = (
                torch.where(codes > 7, codes.float() - 16, codes.float()),
                layout.unpack_scales(scales).float(),
            )
        rows = values * step.repeat_interleave(shape[1] // step.shape[1], 1)
        y = self.entering @ rows.T + inner[: len(output)] @ layout.unpack_up(up).float().T
        output.copy_(y if bias is None else y + layout.unpack_vector(bias).float())

    def awq_gemm_w4a16_g64_int32(self, x, weight, scales, zeros):
        codes = layout.unpack_words(weight, (4 * weight.shape[0], 2 * weight.shape[1])).float()
        rows = codes * scales.float().T.repeat_interleave(64, 1) + zeros.float().T.repeat_interleave(64, 1)
        return (x.float() @ rows.T).to(x.dtype)

    def gemv_awq(self, x, weight, scales, zeros, *_):
        return self.awq_gemm_w4a16_g64_int32(x, weight, scales, zeros)


def loaded(folder, classes, dtype, kind=FluxTransformer2DModel):
    """The model as diffusers makes it of the export: its own replacement of layers, and its own check of keys."""
    config = json.loads((folder / "transformer" / "config.json").read_text())
    block = config.pop("quantization_config")
    parsed = NunchakuLiteQuantizationConfig(**{key: value for key, value in block.items() if key != "quant_method"})
    with torch.device("meta"):
        model = kind.from_config(config).to(dtype)
    assert classes.replace_with_nunchaku_linear(model, parsed.to_dict(), dtype) > 0
    tensors = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    classes.check_strict_state_dict_match(model, tensors)
    for name, value in model.state_dict().items():
        assert (tensors[name].shape, tensors[name].dtype) == (value.shape, value.dtype), name
    missing, own_buffers = model.load_state_dict(tensors, strict=False, assign=True)
    assert not missing
    for name in own_buffers:  # which the model makes by itself, where it is not on the meta device
        parent, _, leaf = name.rpartition(".")
        assert leaf in model.get_submodule(parent)._non_persistent_buffers_set
        model.get_submodule(parent).register_buffer(leaf, tensors[name].to(dtype), persistent=False)
    return model


CASES = {
    "integers": (SVDQUANT, {"dtype": "float16"}, 2e-3),
    "integers in bfloat16": (SVDQUANT, {}, 2e-2),
    "integers without a branch": (
        {**SVDQUANT, "settings": {"data_free": True, "rank": 0, "shift": False}},
        {"dtype": "float16"},
        2e-3,
    ),
    "4-bit floats": (
        {"format": "nvfp4", "bits": 4, "method": "svdquant", "settings": {"data_free": True, "rank": 24}},
        {},
        2e-2,
    ),
}


@pytest.mark.parametrize(("fields", "settings", "close"), CASES.values(), ids=CASES.keys())
@torch.no_grad()
def test_diffusers_own_layers_give_what_the_bundle_gives(
    bundle, wide_flux_folder, classes, flux_inputs, fields, settings, close
):
    small = bundle(wide_flux_folder, **fields)
    folder = export_pipeline(small, ExportConfig(format="nunchaku-lite", settings=settings), output="lite")
    dtype = getattr(torch, settings.get("dtype", "bfloat16"))
    model = loaded(folder, classes, dtype)
    treated = {type(module).__name__ for module in model.modules()}
    assert "SVDQW4A4Linear" in treated
    reference = FluxTransformer2DModel.from_pretrained(small, subfolder="transformer")
    for name, module in model.named_modules():
        if type(module).__name__ == "SVDQW4A4Linear":
            x = torch.randn(7, module.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
            expected = reference.get_submodule(name)(x.float())
            assert (module(x).float() - expected).norm() < close * expected.norm(), name
    found, expected = model(**flux_inputs(dtype)).sample.float(), reference(**flux_inputs(torch.float32)).sample
    assert (found - expected).norm() < 0.1 * expected.norm()


@torch.no_grad()
def test_codes_are_those_of_the_bundle_and_float16_holds_their_scales_exactly(bundle, wide_flux_folder, classes):
    small = bundle(wide_flux_folder, **SVDQUANT)
    settings = {"dtype": "float16"}
    folder = export_pipeline(small, ExportConfig(format="nunchaku-lite", settings=settings), output="lite")
    model = loaded(folder, classes, torch.float16)
    reference = FluxTransformer2DModel.from_pretrained(small, subfolder="transformer")
    name = next(name for name, module in reference.named_modules() if getattr(module, "smoothing", None) is not None)
    layer, original = model.get_submodule(name), reference.get_submodule(name)
    signed = unpack_codes(original.qweight, 4, original.features, signed=True)
    assert torch.equal(layout.unpack_codes(layer.qweight, signed.shape).to(torch.int8), signed & 15)
    assert torch.equal(layout.unpack_scales(layer.wscales), original.scale)
    assert torch.equal(layout.unpack_vector(layer.smooth_factor), original.smoothing)
    assert torch.equal(layout.unpack_up(layer.proj_up)[:, :8], original.low_rank_up)
    assert not layout.unpack_up(layer.proj_up)[:, 8:].any()
    record = json.loads((folder / "dacc_export.json").read_text())["components"]["transformer"]
    assert (record["precision"], record["rank"]) == ("int4", 16)


@pytest.mark.parametrize("symmetric", [True, False])
@torch.no_grad()
def test_weights_behind_floating_point_inputs_keep_their_codes(classes, symmetric):
    from dacc.export.contents import StoredLayer
    from dacc.export.targets.nunchaku_lite import _words, kind_of
    from dacc.quant.methods import rtn

    scheme = Scheme(bits=4, group_size=64, symmetric=symmetric)
    torch.manual_seed(0)
    weight = rtn.quantize(torch.randn(24, 1024), scheme, rtn.RTNConfig())
    stored = {
        name: types.SimpleNamespace(load=lambda tensor=tensor: tensor) for name, tensor in weight.tensors().items()
    }
    layer = StoredLayer(scheme, (24, 1024), stored)
    assert kind_of(layer) == "words"
    made = {name: make() for name, (_, _, make) in _words(layer).items()}
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == {
        name: shape for name, (shape, _, _) in _words(layer).items()
    }
    own = classes.AWQW4A16Linear(1024, 24, bias=False, torch_dtype=torch.float16)
    own.load_state_dict(
        {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in made.items()}
    )
    x = torch.randn(5, 1024).half()
    expected = x.float() @ weight.dequantize().T
    assert (own(x).float() - expected).norm() < 2e-3 * expected.norm()


@torch.no_grad()
def test_a_committed_export_still_gives_what_it_gave(classes):
    model = loaded(FIXTURE, classes, torch.bfloat16, DiTTransformer2DModel)
    assert sum(type(module).__name__ == "SVDQW4A4Linear" for module in model.modules()) == 6
    tensors = load_file(FIXTURE / "expected.safetensors")
    output = tensors.pop("output")
    inputs = {name: value.bfloat16() if value.is_floating_point() else value for name, value in tensors.items()}
    assert (model(**inputs).sample.float() - output).norm() < 0.02 * output.norm()


def test_layers_that_have_no_such_numbers_become_floats_and_are_told(bundle, wide_flux_folder, weights_of):
    reporter = silent()
    small = bundle(wide_flux_folder, **SVDQUANT)
    folder = export_pipeline(small, ExportConfig(format="nunchaku-lite"), output="lite", reporter=reporter)
    tensors = weights_of(folder)
    assert tensors["transformer_blocks.0.norm1.linear.weight"].dtype == torch.bfloat16
    assert any("have no such numbers and become floats" in notice for notice in reporter.notices)
    assert "DIFFUSERS_TRUST_REMOTE_KERNELS" in (folder / "README.md").read_text()


@pytest.mark.parametrize("fields", [{"bits": 8}, {"bits": 4, "act_bits": 4, "act_mode": "dynamic"}])
def test_a_bundle_without_such_numbers_is_refused_with_advice(bundle, wide_flux_folder, tmp_path, fields):
    small = bundle(wide_flux_folder, **fields)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UnsupportedError, match=r"no linear of transformer .* --method svdquant --set shift=false"):
        export_pipeline(small, ExportConfig(format="nunchaku-lite"), output=tmp_path / "lite")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
