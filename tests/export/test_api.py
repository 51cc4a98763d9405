"""Exports as plain floats: plain diffusers reads them, and they are the weights that they are said to be."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel
from safetensors.torch import load_file

import dacc
from dacc.core.errors import ConfigError, ModelError, UnsupportedError
from dacc.core.reporter import silent
from dacc.export.api import export_pipeline
from dacc.export.config import ExportConfig


def weights_of(folder, component="transformer"):
    return load_file(folder / component / "diffusion_pytorch_model.safetensors")


def test_bfloat16_has_what_the_integers_stand_for(bundle, dit_folder):
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


def test_a_float_pipeline_is_only_cast(unet_folder):
    folder = export_pipeline(unet_folder, ExportConfig(format="safetensors-bf16"), output="plain")
    before, after = weights_of(unet_folder, "unet"), weights_of(folder, "unet")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name].bfloat16()) for name in before)


def test_float8_rounds_the_float_weights_of_the_layers_that_the_bundle_quantizes(bundle, dit_folder):
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


def test_float8_runs_with_layerwise_casting(flux_folder, flux_pipeline):
    folder = export_pipeline(flux_folder, ExportConfig(format="safetensors-fp8"), output="eight")
    lines = (folder / "README.md").read_text().split("```")[1].removeprefix("python\n")
    scope = {}
    exec(lines.replace('folder = "..."', f"folder = {str(folder)!r}"), scope)
    model = scope["pipe"].transformer
    assert model.transformer_blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn
    inputs = _flux_inputs(torch.bfloat16)
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


def test_without_the_float_pipeline_rounded_weights_are_rounded_again(bundle, dit_folder, tmp_path):
    small, reporter = bundle(dit_folder, bits=4), silent()
    (tmp_path / "tiny-dit").rename(tmp_path / "elsewhere")
    config = ExportConfig(format="safetensors-fp8")
    folder = export_pipeline(small, config, output="eight", reporter=reporter)
    assert any("once more" in notice for notice in reporter.notices)
    again = export_pipeline(small, config, output="again", reference=tmp_path / "elsewhere")
    name = "transformer_blocks.0.attn1.to_q.weight"
    rounded = dacc.load(small).transformer.get_submodule(name.removesuffix(".weight")).weight
    assert torch.equal(weights_of(folder)[name].float(), rounded.to(torch.float8_e4m3fn).float())
    assert torch.equal(weights_of(again)[name].float(), weights_of(dit_folder)[name].to(torch.float8_e4m3fn).float())


def test_the_pipeline_before_its_adapters_were_fused_is_no_reference(bundle, dit_folder):
    small, reporter = bundle(dit_folder, bits=4), silent()
    file = small / "dacc_manifest.json"
    manifest = json.loads(file.read_text())
    manifest["components"]["transformer"]["reference_hash"] = "of the weights with the adapters in them"
    file.write_text(json.dumps(manifest))
    config = ExportConfig(format="safetensors-fp8")
    folder = export_pipeline(small, config, output="eight", reporter=reporter)
    assert any("once more" in notice for notice in reporter.notices)
    name = "transformer_blocks.0.attn1.to_q"
    rounded = dacc.load(small).transformer.get_submodule(name).weight
    assert torch.equal(weights_of(folder)[f"{name}.weight"].float(), rounded.to(torch.float8_e4m3fn).float())
    with pytest.raises(ModelError, match="other weights"):
        export_pipeline(small, config, output="again", reference=dit_folder)


def test_another_pipeline_is_no_reference(bundle, dit_folder, unet_folder):
    with pytest.raises(ModelError, match="other weights"):
        export_pipeline(
            bundle(dit_folder, bits=4), ExportConfig(format="safetensors-fp8"), output="x", reference=unet_folder
        )


def test_unknown_formats_and_fields_are_refused(dit_folder):
    with pytest.raises(ConfigError, match="no export format 'ggfu'"):
        export_pipeline(dit_folder, ExportConfig(format="ggfu"))
    with pytest.raises(ConfigError, match="type"):
        export_pipeline(dit_folder, ExportConfig(format="safetensors-bf16", settings={"type": "q4_0"}))


def test_other_libraries_are_refused(sd_folder):
    with pytest.raises(UnsupportedError, match="CLIPTextModel of transformers"):
        export_pipeline(sd_folder, ExportConfig(format="safetensors-bf16", component=("text_encoder",)))


def test_weights_that_others_quantized_are_refused(dit_folder, tmp_path):
    folder = Path(shutil.copytree(dit_folder, tmp_path / "other"))
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    file.write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="quantized by bitsandbytes"):
        export_pipeline(folder, ExportConfig(format="safetensors-bf16"), output="x")


def test_a_vae_can_be_exported(sd_folder):
    folder = export_pipeline(sd_folder, ExportConfig(format="safetensors-bf16", component=("vae",)), output="x")
    assert next(iter(weights_of(folder, "vae").values())).dtype == torch.bfloat16
    assert next(iter(weights_of(folder, "unet").values())).dtype == torch.float32
    DiffusionPipeline.from_pretrained(folder)


def _modules(bundle):
    manifest = json.loads((bundle / "dacc_manifest.json").read_text())
    return manifest["components"]["transformer"]["quantization"]["modules"]


def _flux_inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 4, 16, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(1, 3, 32, generator=generator).to(dtype),
        "pooled_projections": torch.randn(1, 32, generator=generator).to(dtype),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
    }
