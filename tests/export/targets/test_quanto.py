"""optimum-quanto: plain diffusers loads it, and its tensors stand for what those of the bundle do."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DiTTransformer2DModel

import dacc
from dacc.export.api import export_pipeline
from dacc.export.config import ExportConfig
from dacc.export.rows import round_rows

NEEDS = "optimum-quanto is not installed"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers drops this loader in 1.0, as docs say


def exported(source):
    folder = export_pipeline(source, ExportConfig(format="quanto"), output="out")
    return folder, json.loads((folder / "dacc_export.json").read_text())["components"]["transformer"]


@torch.no_grad()
def test_plain_diffusers_computes_with_the_weights_of_the_bundle(bundle, dit_folder):
    pytest.importorskip("optimum.quanto", reason=NEEDS)
    small = bundle(dit_folder, bits=8)
    folder, record = exported(small)
    assert record["layers"] == record["same_codes"] > 0
    found = DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=torch.float32)
    expected = dacc.load(small).transformer
    treated = 0
    for name, layer in found.named_modules():
        if type(layer).__name__ == "QLinear":
            treated += 1
            assert torch.equal(layer.weight.dequantize(), expected.get_submodule(name).weight), name
    assert treated == record["layers"]
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([9, 500]),
        "class_labels": torch.tensor([1, 2]),
    }
    outputs = [model(**inputs).sample for model in (found, expected)]
    assert (outputs[0] - outputs[1]).norm() < 5e-3 * outputs[1].norm()  # float tensors are bfloat16


def test_groups_are_rounded_once_more_and_it_is_told(bundle, dit_folder, weights_of):
    small = bundle(dit_folder, bits=4, group_size=32)
    folder, record = exported(small)
    name = "transformer_blocks.0.attn1.to_q"
    codes, scale = round_rows(dacc.load(small).transformer.get_submodule(name).weight)
    tensors = weights_of(folder)
    assert torch.equal(tensors[f"{name}.weight._data"], codes)
    assert torch.equal(tensors[f"{name}.weight._scale"], scale)
    assert record["same_codes"] < record["layers"]
    notices = json.loads((folder / "dacc_export.json").read_text())["notices"]
    assert any("rounded once more" in notice for notice in notices)
