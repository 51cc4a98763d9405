"""Plain bfloat16: plain diffusers reads it, and it is the weights that it is said to be."""

from __future__ import annotations

import subprocess
import sys

import torch
from diffusers import DiTTransformer2DModel

import dacc
from dacc.export.api import export_pipeline
from dacc.export.config import ExportConfig


def test_bfloat16_has_what_the_integers_stand_for(bundle, dit_folder, weights_of):
    small = bundle(dit_folder, bits=4)
    folder = export_pipeline(small, ExportConfig(format="safetensors-bf16"), output="plain")
    quantized = dacc.load(small).transformer
    exported = weights_of(folder)
    plain = DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=torch.float32)
    assert exported.keys() == plain.state_dict().keys()
    name = "transformer_blocks.0.attn1.to_q"
    assert torch.equal(exported[f"{name}.weight"], quantized.get_submodule(name).weight.bfloat16())
    assert torch.equal(exported[f"{name}.bias"], quantized.get_submodule(name).bias.bfloat16())


def test_a_process_without_dacc_loads_it(bundle, dit_folder):
    folder = export_pipeline(bundle(dit_folder, bits=4), ExportConfig(format="safetensors-bf16"), output="plain")
    code = (
        "import sys; from diffusers import DiffusionPipeline;"
        "DiffusionPipeline.from_pretrained(sys.argv[1]); assert 'dacc' not in sys.modules"
    )
    subprocess.run([sys.executable, "-P", "-c", code, folder], check=True, capture_output=True)


def test_a_float_pipeline_is_only_cast(unet_folder, weights_of):
    folder = export_pipeline(unet_folder, ExportConfig(format="safetensors-bf16"), output="plain")
    before, after = weights_of(unet_folder, "unet"), weights_of(folder, "unet")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name].bfloat16()) for name in before)
