"""torchao: plain diffusers loads it, and its tensors stand for what those of the bundle do."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DiTTransformer2DModel

import dacc
from dacc.export.api import export_pipeline
from dacc.export.config import ExportConfig

CASES = {
    "rows of 8 bits": ({"bits": 8}, "Int8Tensor"),
    "groups of 4 bits": ({"bits": 4, "group_size": 32}, "IntxUnpackedToInt8Tensor"),
    "two-level": ({"bits": 4, "act_bits": 8}, "Int8Tensor"),
}


@pytest.mark.parametrize(("fields", "kind"), CASES.values(), ids=CASES)
@torch.no_grad()
def test_plain_diffusers_computes_with_the_weights_of_the_bundle(bundle, dit_folder, fields, kind):
    pytest.importorskip("torchao", reason="torchao is not installed")
    small = bundle(dit_folder, **fields)
    folder = export_pipeline(small, ExportConfig(format="torchao"), output="out")
    record = json.loads((folder / "dacc_export.json").read_text())["components"]["transformer"]
    assert record["layers"] == record["same_codes"] > 0
    found = DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=torch.float32)
    expected = dacc.load(small).transformer
    kinds = set()
    for name, layer in found.named_modules():
        weight = getattr(layer, "weight", None)
        if hasattr(weight, "qdata"):
            kinds.add(type(weight).__name__)
            groups = weight.scale.shape[1]
            parts = [
                part.float().repeat_interleave(weight.shape[1] // groups, 1)
                for part in (weight.scale, weight.zero_point)
            ]
            decoded = (weight.qdata.float() - parts[1]) * parts[0]
            assert torch.equal(decoded, expected.get_submodule(name).stored.dequantize()), name
            torch.testing.assert_close(weight.dequantize().float(), decoded, rtol=2**-8, atol=0)  # torchao's own
    assert kind in kinds
    inputs = [torch.randn(2, 4, 8, 8), torch.tensor([9, 500]), torch.tensor([1, 2])]
    output, exact = found(*inputs).sample, expected(*inputs).sample
    assert (output - exact).norm() < 0.05 * exact.norm()  # two-level: the bundle rounds activations, torchao does not
