"""LLM.int8(): diffusers' loader refuses a processor, so bitsandbytes' own layers and functions read the file."""

from __future__ import annotations

import json

import pytest
import torch

import dacc
from dacc.export.api import export_pipeline
from dacc.export.config import ExportConfig

NAME = "transformer_blocks.0.attn1.to_q"


@pytest.fixture
def exported(bundle, dit_folder):
    small = bundle(dit_folder, bits=8)
    return small, export_pipeline(small, ExportConfig(format="bitsandbytes-int8"), output="out")


def test_codes_and_largest_values_are_those_of_the_bundle(exported, weights_of):
    small, folder = exported
    model, tensors = dacc.load(small).transformer, weights_of(folder)
    treated = [name.removesuffix(".SCB") for name in tensors if name.endswith(".SCB")]
    for name in treated:
        layer = model.get_submodule(name)
        assert torch.equal(tensors[f"{name}.weight"], layer.qweight.view(torch.int8))
        torch.testing.assert_close(tensors[f"{name}.SCB"] / 127, layer.scale.float().flatten(), rtol=3e-7, atol=0)
    record = json.loads((folder / "dacc_export.json").read_text())["components"]["transformer"]
    assert record["layers"] == record["same_codes"] == len(treated)


@torch.no_grad()
def test_its_own_layer_takes_the_tensors_and_its_own_function_decodes_them(exported, weights_of):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    small, folder = exported
    tensors, weight = weights_of(folder), dacc.load(small).transformer.get_submodule(NAME).weight
    own = {name.removeprefix(f"{NAME}."): tensor for name, tensor in tensors.items() if name.startswith(f"{NAME}.")}
    decoded = bitsandbytes.functional.int8_vectorwise_dequant(own["weight"], own["SCB"])
    torch.testing.assert_close(decoded.float(), weight, rtol=1e-5, atol=0)
    layer = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    fields = {"requires_grad": False, "has_fp16_weights": False, "CB": own["weight"], "SCB": own["SCB"]}
    layer.weight = bitsandbytes.nn.Int8Params(own["weight"], **fields)
    layer.bias = torch.nn.Parameter(own["bias"])
    x = torch.randn(5, 64).half()
    expected = x.float() @ weight.T + own["bias"].float()
    assert (layer(x).float() - expected).norm() < 0.02 * expected.norm()


def test_diffusers_is_told_what_stays_floating_point(exported):
    from diffusers import BitsAndBytesConfig, DiTTransformer2DModel

    _, folder = exported
    config = json.loads((folder / "transformer" / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == ["proj_out_1", "proj_out_2"]
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    assert BitsAndBytesConfig.from_dict(config).load_in_8bit
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="No GPU found"):  # why the loader itself is not tested here
            DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")
