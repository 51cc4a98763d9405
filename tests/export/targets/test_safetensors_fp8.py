"""8-bit floats: which weights they are, that diffusers keeps them so, and what does not fit."""

from __future__ import annotations

import json

import pytest
import torch

from dacc.core.errors import UnsupportedError
from dacc.core.reporter import silent
from dacc.export.api import export_pipeline
from dacc.export.config import ExportConfig


def test_float8_rounds_the_float_weights_of_the_layers_that_the_bundle_quantizes(bundle, dit_folder, weights_of):
    reporter = silent()
    small = bundle(dit_folder, bits=4)
    folder = export_pipeline(small, ExportConfig(format="safetensors-fp8"), output="eight", reporter=reporter)
    before, after = weights_of(dit_folder), weights_of(folder)
    eight = {name for name, tensor in after.items() if tensor.dtype == torch.float8_e4m3fn}
    quantized = {name for name, module in _modules(small).items() if module["scheme"]}
    assert eight == {f"{name}.weight" for name in quantized}
    for name, tensor in before.items():
        expected = tensor.to(torch.float8_e4m3fn if name in eight else torch.bfloat16)
        assert torch.equal(after[name].float(), expected.float())
    assert any("rounds the weights of tiny-dit" in notice for notice in reporter.notices)
    record = json.loads((folder / "dacc_export.json").read_text())
    assert record["weights"] == "rounded anew from the float reference"


def test_float8_runs_with_layerwise_casting(flux_folder, flux_pipeline, flux_inputs):
    folder = export_pipeline(flux_folder, ExportConfig(format="safetensors-fp8"), output="eight")
    lines = (folder / "README.md").read_text().split("```")[1].removeprefix("python\n")
    scope = {}
    exec(lines.replace('folder = "..."', f"folder = {str(folder)!r}"), scope)
    model = scope["pipe"].transformer
    assert model.transformer_blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn
    inputs = flux_inputs(torch.bfloat16)
    with torch.no_grad():
        found, exact = model(**inputs).sample, flux_pipeline().transformer.bfloat16()(**inputs).sample
    assert (found - exact).norm() < 0.1 * exact.norm()


def test_float8_refuses_what_it_cannot_hold(tmp_path, unet_pipeline):
    pipe = unet_pipeline()
    with torch.no_grad():
        pipe.unet.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] = 449.0
    pipe.save_pretrained(tmp_path / "wide")
    with pytest.raises(UnsupportedError, match=r"mid_block.resnets.0.conv1.weight of unet has values up to 449"):
        export_pipeline(tmp_path / "wide", ExportConfig(format="safetensors-fp8"), output="eight")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wide"]


def _modules(bundle):
    manifest = json.loads((bundle / "dacc_manifest.json").read_text())
    return manifest["components"]["transformer"]["quantization"]["modules"]
