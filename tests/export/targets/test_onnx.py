"""The ONNX graph in onnxruntime against the model in PyTorch, and its codes against those of the bundle."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import dacc
from dacc.core.errors import UnsupportedError
from dacc.export.api import export_pipeline
from dacc.export.config import ExportConfig

onnx = pytest.importorskip("onnx", reason="the onnx package is not installed")
runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

DIT_INPUTS = {
    "hidden_states": torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    "timestep": torch.full((6,), 500),
    "class_labels": torch.arange(6),
}


def exported(source, output="graph", **options):
    folder = export_pipeline(source, ExportConfig(format="onnx", **options), output=output)
    (record,) = json.loads((folder / "dacc_export.json").read_text())["components"].values()
    return folder / record["file"]


def run(file, inputs, *, fused=False):
    """Output of the graph; fused products of packed weights may round what enters them too."""
    options = runtime.SessionOptions()
    if not fused:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def weights_in(file):
    """Layer -> what the integers of the graph stand for, in float32 with the output channels first."""
    graph = onnx.load(file).graph
    stored = {
        entry.name: torch.from_numpy(onnx.numpy_helper.to_array(entry).astype("float32")) for entry in graph.initializer
    }
    found = {}
    for node in graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        codes, scale, *zero = (stored[name] for name in node.input)
        fields = {entry.name: entry.i for entry in node.attribute}
        parts = [scale, *zero]
        if block := fields.get("block_size"):
            parts = [part.repeat_interleave(block, fields["axis"]) for part in parts]
        else:
            parts = [part.view([-1 if axis == fields["axis"] else 1 for axis in range(codes.ndim)]) for part in parts]
        weight, output = (codes - parts[1] if zero else codes) * parts[0], node.output[0]
        for divide in (entry for entry in graph.node if entry.op_type == "Div" and entry.input[0] == output):
            weight, output = weight / stored[divide.input[1]], divide.output[0]
        name = node.input[0].removeprefix("model.").removesuffix(".weight.codes")
        found[name] = weight.t() if output != f"model.{name}.weight" else weight
    return found


@pytest.mark.parametrize(
    ("fields", "close"),
    [
        ({"bits": 8}, 1e-4),
        ({"bits": 4, "group_size": 32}, 1e-4),
        ({"bits": 4, "act_bits": 8}, 0.05),
        ({"bits": 4, "act_bits": 8, "method": "svdquant", "settings": {"rank": 0, "data_free": True}}, 0.05),
    ],
    ids=["8 bits", "4 bits in groups", "two-level", "smoothed"],
)
@torch.no_grad()
def test_integers_are_those_of_the_bundle_and_run(bundle, dit_folder, fields, close):
    small = bundle(dit_folder, **fields)
    file = exported(small)
    model = dacc.load(small).transformer
    expected = {name: layer.stored.dequantize() for name, layer in model.named_modules() if hasattr(layer, "scheme")}
    found = weights_in(file)
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        # two-level scales: the product of codes and group scales is exact
        assert torch.equal(weight, expected[name]), name
    # activations stay floats in the graph
    exact = model(**DIT_INPUTS).sample
    assert relative(run(file, DIT_INPUTS), exact) < close
    assert relative(run(file, DIT_INPUTS, fused=True), exact) < close + 0.01


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 4, "group_size": 32},
        {"bits": 8},
        {"bits": 4, "act_bits": 8, "method": "svdquant", "settings": {"rank": 0, "data_free": True}},
    ],
    ids=["4 bits in groups", "8 bits", "smoothed two-level"],
)
def test_openvino_reads_the_same_graph(bundle, dit_folder, fields):
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    file = exported(bundle(dit_folder, **fields))
    compiled = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = torch.from_numpy(compiled({name: value.numpy() for name, value in DIT_INPUTS.items()})[0])
    assert relative(found, run(file, DIT_INPUTS)) < 1e-5


@torch.no_grad()
def test_a_float_pipeline_is_float32_throughout(unet_folder, unet_pipeline):
    file = exported(unet_folder)
    inputs = {"sample": torch.randn(4, 1, 16, 16), "timestep": torch.tensor(300)}
    assert relative(run(file, inputs), unet_pipeline().unet(**inputs).sample) < 1e-3
    assert not weights_in(file)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "close"),
    [({"bits": 8}, 1e-3), ({"bits": 8, "act_bits": 8, "method": "gptq"}, 0.05)],
    ids=["weights", "smoothed"],
)
@torch.no_grad()
def test_convolutions_keep_their_codes_too(bundle, unet_folder, fields, close):
    small = bundle(unet_folder, **fields)
    file = exported(small)
    inputs = {"sample": torch.randn(3, 1, 16, 16), "timestep": torch.tensor(300)}
    unet = dacc.load(small).unet
    assert relative(run(file, inputs), unet(**inputs).sample) < close
    name = "mid_block.resnets.0.conv1"
    assert unet.get_submodule(name).scheme.smooth == ("method" in fields)
    assert torch.equal(weights_in(file)[name], unet.get_submodule(name).stored.dequantize())
    whole = sum(value.numel() for value in unet.parameters())
    assert file.stat().st_size < exported(unet_folder, "floats").stat().st_size < 6 * whole


def test_only_denoisers_are_exported(sd_folder):
    with pytest.raises(UnsupportedError, match="vae is no denoiser"):
        exported(sd_folder, component=("vae",))


def test_without_the_package_the_advice_is_to_install_it(dit_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UnsupportedError, match=r"dacc-diffusion\[onnx\]"):
        export_pipeline(dit_folder, ExportConfig(format="onnx"), output="x")
