"""From which weights an export is made, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

import dacc
from dacc.core.errors import ConfigError, ModelError, UnsupportedError
from dacc.core.reporter import silent
from dacc.export.api import export_pipeline
from dacc.export.config import ExportConfig


def test_without_the_float_pipeline_rounded_weights_are_rounded_again(bundle, dit_folder, tmp_path, weights_of):
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


def test_the_pipeline_before_its_adapters_were_fused_is_no_reference(bundle, dit_folder, weights_of):
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


def test_an_empty_output_is_refused(dit_folder):
    with pytest.raises(ConfigError, match="the output is empty"):
        export_pipeline(dit_folder, ExportConfig(format="safetensors-bf16"), output="")


def test_other_libraries_are_refused(sd_folder):
    with pytest.raises(UnsupportedError, match="CLIPTextModel of transformers"):
        export_pipeline(sd_folder, ExportConfig(format="safetensors-fp8", component=("text_encoder",)))
    with pytest.raises(UnsupportedError, match="DDIMScheduler of diffusers"):
        export_pipeline(sd_folder, ExportConfig(format="safetensors-bf16", component=("scheduler",)))


def test_weights_that_others_quantized_are_refused(dit_folder, tmp_path):
    folder = Path(shutil.copytree(dit_folder, tmp_path / "other"))
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    file.write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="quantized by bitsandbytes"):
        export_pipeline(folder, ExportConfig(format="safetensors-bf16"), output="x")


def test_a_vae_can_be_exported(sd_folder, weights_of):
    folder = export_pipeline(sd_folder, ExportConfig(format="safetensors-bf16", component=("vae",)), output="x")
    assert next(iter(weights_of(folder, "vae").values())).dtype == torch.bfloat16
    assert next(iter(weights_of(folder, "unet").values())).dtype == torch.float32
    DiffusionPipeline.from_pretrained(folder)


def test_a_text_encoder_can_be_plain_bfloat16(sd_folder):
    folder = export_pipeline(
        sd_folder, ExportConfig(format="safetensors-bf16", component=("text_encoder",)), output="x"
    )
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    exact = DiffusionPipeline.from_pretrained(sd_folder).text_encoder.state_dict()
    found = pipe.text_encoder.state_dict()
    assert found.keys() == exact.keys()
    assert all(torch.equal(found[name], exact[name].to(found[name].dtype)) for name in exact)
    file = folder / "text_encoder" / "model.safetensors"
    assert file.stat().st_size < 0.6 * (sd_folder / "text_encoder" / "model.safetensors").stat().st_size
