"""docs/format.md is enough: the program in it, run alone, reads every layer exactly as dacc does."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy
import pytest
import torch
from jsonschema import Draft202012Validator
from safetensors.torch import save_file

from dacc.core.manifest import Manifest, read_manifest
from dacc.core.scheme import Scheme
from dacc.runtime.layers import QuantizedLayer
from dacc.runtime.low_rank import LOW_RANK_NAMES
from dacc.runtime.packing import pack_codes
from dacc.runtime.weight import QuantizedWeight, state_shapes

DOCS = Path(__file__).resolve().parents[1] / "docs"
TEXT = (DOCS / "format.md").read_text(encoding="utf-8")
PROGRAM = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)[-1]
BUNDLES = {
    "3 bits": ("dit_folder", {"bits": 3}),
    "4 bits with groups of 32": ("dit_folder", {"bits": 4, "group_size": 32, "symmetric": True}),
    "5 bits asymmetric per channel": ("unet_folder", {"bits": 5, "group_size": "channel", "symmetric": False}),
    "6 bits": ("unet_folder", {"bits": 6}),
    "4 bits asymmetric": ("unet_folder", {"bits": 4}),
    "two levels": ("unet_folder", {"bits": 4, "act_bits": 8}),
    "4-bit floats": ("dit_folder", {"format": "nvfp4"}),
    "grouped convolutions": ("sana_folder", {"bits": 3}),
}


@pytest.mark.parametrize("name", BUNDLES)
def test_the_program_in_the_docs_reads_every_layer_bit_for_bit(name, request, bundle_of, run_python):
    kind, fields = BUNDLES[name]
    bundle = bundle_of(request.getfixturevalue(kind), **fields)
    component, record = next(iter(read_manifest(bundle).components.items()))
    run_python(f"import sys\nsys.modules.update(torch=None, dacc=None)\n{PROGRAM}", bundle, component, "layers.npz")
    model = getattr(diffusers, record.class_name).from_pretrained(bundle, subfolder=component)
    layers = {key: module for key, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    found = numpy.load("layers.npz")
    assert set(found) == set(layers)
    for key, layer in layers.items():
        assert found[key].shape == tuple(layer.weight.shape)
        assert torch.equal(torch.from_numpy(found[key]), layer.weight), key


BY_HAND = {
    "linear": (Scheme(bits=8, act_bits=8, act_mode="static", split=16), (6, 48)),
    "shortcut": (Scheme(bits=4, act_bits=6, act_mode="per-step", act_steps=20, split=13), (6, 48, 1, 1)),
    "groups": (Scheme(bits=4, symmetric=False, group_size=8, split=40), (6, 48)),
    "halves": (Scheme(bits=3, symmetric=False, group_size=24, split=24), (6, 48)),
    "zero points": (Scheme(bits=5, symmetric=False, split=47), (6, 48)),
    "two levels": (
        Scheme(bits=4, group_size=8, two_level=True, act_bits=8, act_mode="dynamic", split=16),
        (6, 48, 1, 1),
    ),
    "smoothing": (Scheme(bits=8, act_bits=8, act_mode="dynamic", smooth=True), (6, 48)),
    "smoothing of channels": (Scheme(bits=8, act_bits=8, act_mode="dynamic", smooth=True), (6, 16, 3, 1)),
    "zero points of activations": (Scheme(bits=8, act_bits=8, act_mode="dynamic", act_offset=True, split=16), (6, 48)),
    "activations per group": (
        Scheme(bits=4, group_size=8, act_bits=4, act_mode="per-group", act_group_size=8, rank=3, smooth=True),
        (6, 48),
    ),
    "groups of parts": (Scheme(bits=8, act_bits=8, act_mode="per-group", act_group_size=8, split=16), (6, 48)),
    "4-bit floats": (Scheme(format="nvfp4", bits=4, group_size=16), (6, 48)),
    "4-bit floats and more": (Scheme(format="nvfp4", bits=4, group_size=16, rank=4, smooth=True), (6, 48)),
    "low rank": (Scheme(bits=4, symmetric=False, group_size=8, rank=5, smooth=True), (6, 48)),
    "shifted": (
        Scheme(bits=4, group_size=8, act_bits=4, act_mode="per-group", act_group_size=8, smooth=True, shifted=True),
        (6, 48),
    ),
    "low rank alone": (Scheme(bits=4, split=16, rank=6), (6, 48)),
    "wide factors": (Scheme(bits=3, rank=2), (6, 48)),
}


def random_weight(scheme, shape):
    shapes = state_shapes(scheme, shape)
    low, high = scheme.code_range
    codes = torch.randint(low, high + 1, (shape[0], math.prod(shape[1:])))
    largest = 126 if scheme.format == "nvfp4" else 15
    zero_point = None if scheme.symmetric else torch.randint(0, high + 1, shapes["zero_point"][0])
    group_scale = torch.randint(1, largest + 1, shapes["group_scale"][0]) if "group_scale" in shapes else None
    scale = torch.rand(shapes["scale"][0])
    packed = QuantizedWeight.from_codes(
        codes, scheme, shape, scale=scale, zero_point=zero_point, group_scale=group_scale
    )
    beside = {
        name: (torch.rand(shapes[name][0]) + 0.1).to(shapes[name][1]) for name in LOW_RANK_NAMES if name in shapes
    }
    return replace(packed, **beside)


def test_the_program_in_the_docs_reads_layers_of_two_parts_and_low_rank_branches(tmp_path, run_python):
    torch.manual_seed(0)
    weights = {name: random_weight(*made) for name, made in BY_HAND.items()}
    wide = weights["wide factors"]
    weights["wide factors"] = replace(wide, low_rank_up=1e5 * wide.low_rank_up.float())
    (tmp_path / "unet").mkdir()
    tensors = {
        f"{name}.{leaf}": tensor for name, weight in weights.items() for leaf, tensor in weight.tensors().items()
    }
    tensors["linear.act_scale"] = torch.ones(1, 2)
    save_file(tensors, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    record = {
        "schemes": {scheme.name: scheme.model_dump() for scheme, _ in BY_HAND.values()},
        "modules": {name: {"scheme": scheme.name, "shape": shape} for name, (scheme, shape) in BY_HAND.items()},
    }
    (tmp_path / "dacc_manifest.json").write_text(json.dumps({"components": {"unet": {"quantization": record}}}))
    run_python(f"import sys\nsys.modules.update(torch=None, dacc=None)\n{PROGRAM}", tmp_path, "unet", "layers.npz")
    found = numpy.load("layers.npz")
    assert set(found) == set(BY_HAND)
    for name, weight in weights.items():
        assert torch.equal(torch.from_numpy(found[name]), weight.dequantize()), name


def test_the_bundles_above_hold_every_kind_of_layer_and_scheme(request, bundle_of):
    kinds, schemes = set(), set()
    for kind, fields in BUNDLES.values():
        bundle = bundle_of(request.getfixturevalue(kind), **fields)
        component, record = next(iter(read_manifest(bundle).components.items()))
        model = getattr(diffusers, record.class_name).from_pretrained(bundle, subfolder=component)
        for module in model.modules():
            if isinstance(module, QuantizedLayer):
                kinds.add(f"{type(module).__name__} {'grouped' if getattr(module, 'groups', 1) > 1 else ''}".strip())
                schemes.add(module.scheme)
    assert kinds >= {"QuantizedLinear", "QuantizedConv2d", "QuantizedConv2d grouped", "QuantizedEmbedding"}
    assert {scheme.bits for scheme in schemes} >= {3, 4, 5, 6, 8}
    assert any(scheme.two_level for scheme in schemes)
    assert any(not scheme.symmetric and scheme.group_size is None for scheme in schemes)


@pytest.mark.parametrize(
    ("codes", "bits", "written"), [([1, -1, 7, -8], 4, "F1 87"), ([5, 1, 7], 3, "CD 01")], ids=["4 bits", "3 bits"]
)
def test_the_worked_examples_are_right(codes, bits, written):
    assert bytes(pack_codes(torch.tensor([codes]), bits)[0].tolist()).hex(" ").upper() == written
    assert f"codes {', '.join(map(str, codes))}:" in TEXT
    assert f"bytes   {written} " in TEXT


def test_the_schema_is_current():
    text = json.dumps(Manifest.model_json_schema(), indent=1, sort_keys=True) + "\n"
    assert (DOCS / "manifest.schema.json").read_text() == text, "write json.dumps of Manifest.model_json_schema() there"


@pytest.mark.parametrize("name", ["3 bits", "grouped convolutions"])
def test_a_manifest_follows_the_schema(name, request, bundle_of):
    kind, fields = BUNDLES[name]
    schema = json.loads((DOCS / "manifest.schema.json").read_text())
    manifest = bundle_of(request.getfixturevalue(kind), **fields) / "dacc_manifest.json"
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(json.loads(manifest.read_text()))


def test_every_field_is_in_the_docs():
    definitions = Manifest.model_json_schema()["$defs"].values()
    names = {name for part in [Manifest.model_json_schema(), *definitions] for name in part["properties"]}
    assert not {name for name in names if not re.search(rf"[`.]{name}\b", TEXT)}
    assert all(f"| `{name}` |" in TEXT for name in Scheme.model_fields)
