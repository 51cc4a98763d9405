"""Text encoders: what transformers' own rules and loaders make of them. It loads bitsandbytes on a processor too."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
import transformers
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from dacc.core.errors import ModelError, UnsupportedError
from dacc.export.api import export_pipeline
from dacc.export.config import ExportConfig
from dacc.export.contents import read_contents
from dacc.export.rows import round_rows
from dacc.export.targets.bitsandbytes_nf4 import BLOCK, LEVELS, quantize_nf4
from dacc.export.text_encoders import split_linears

NEEDS = "bitsandbytes is not installed"
CLIP = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
T5 = {"vocab_size": 40, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 2}
LLAMA = CLIP | {"num_key_value_heads": 1, "head_dim": 16}
CASES: dict[str, dict[str, Any]] = {
    "CLIPTextModel": CLIP,
    "CLIPTextModelWithProjection": CLIP | {"projection_dim": 48},
    "T5EncoderModel": T5 | {"feed_forward_proj": "gated-gelu"},
    "UMT5EncoderModel": T5,
    "LlamaForCausalLM": LLAMA,
    "Gemma2ForCausalLM": LLAMA,  # tied output embeddings
}
CODES = (torch.int8, torch.uint8)
IDS = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def encoder_folder(tmp_path):
    """A pipeline that is one text encoder: `encoder_folder("T5EncoderModel")`."""

    def make(name):
        torch.manual_seed(0)
        model_class = getattr(transformers, name)
        model_class(model_class.config_class(**CASES[name])).save_pretrained(tmp_path / "tiny" / "text_encoder")
        index = {"_class_name": "DiffusionPipeline", "text_encoder": ["transformers", name]}
        (tmp_path / "tiny" / "model_index.json").write_text(json.dumps(index))
        return tmp_path / "tiny"

    return make


def exported(folder, form, component="text_encoder", **settings):
    config = ExportConfig(format=form, component=(component,), settings=settings)
    return export_pipeline(folder, config, output=folder.parent / "out", overwrite=True) / component


def loaded(folder, **options):
    name = json.loads((folder.parent / "model_index.json").read_text())[folder.name][1]
    return getattr(transformers, name).from_pretrained(folder, **options).eval()


def by_kind(model, kind):
    return {name: layer for name, layer in model.named_modules() if type(layer).__name__ == kind}


@pytest.mark.parametrize("name", CASES)
def test_the_linears_that_are_rounded_are_those_that_transformers_rounds_by_itself(encoder_folder, name):
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    folder = encoder_folder(name)
    split = split_linears(read_contents(folder / "text_encoder", None, None))
    model = loaded(folder / "text_encoder")
    left_out = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    linears = by_kind(model, "Linear")
    expected = {layer for layer in linears if should_convert_module(layer, left_out)}
    found = {layer for layer in linears if should_convert_module(layer, split.left_out)}
    assert found == expected == set(split.rounded)
    assert split.rounded == {layer: linears[layer].weight.shape for layer in expected}
    assert all(layer.endswith(".wo") for layer in split.wide)
    assert bool(split.wide) == ("T5" in name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["CLIPTextModelWithProjection", "T5EncoderModel"])
@torch.no_grad()
def test_transformers_loads_int8_and_bitsandbytes_decodes_it(encoder_folder, name, dtype):
    library = pytest.importorskip("bitsandbytes", reason=NEEDS)
    folder = encoder_folder(name)
    out = exported(folder, "bitsandbytes-int8", dtype=dtype)
    exact, found = loaded(folder / "text_encoder"), loaded(out)
    treated = by_kind(found, "Linear8bitLt")
    assert set(treated) == set(split_linears(read_contents(folder / "text_encoder", None, None)).rounded)
    for layer, module in treated.items():
        codes, scale = round_rows(exact.get_submodule(layer).weight)
        assert torch.equal(module.weight.data, codes), layer
        decoded = library.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
        torch.testing.assert_close(decoded.float(), codes * scale, rtol=1e-6, atol=0)
        exact.get_submodule(layer).weight.copy_(codes * scale)
    short = getattr(torch, dtype)
    for layer, parameter in found.named_parameters():
        wide = layer.endswith("wo.weight") and dtype == "float16"
        assert parameter.dtype in ([torch.float32] if wide else [short, torch.int8]), layer
    output, expected = found(IDS)[0].float(), exact(IDS)[0]
    assert (output - expected).norm() < 0.03 * expected.norm()  # bitsandbytes rounds what enters the layers


@pytest.mark.parametrize("name", ["CLIPTextModelWithProjection", "T5EncoderModel"])
@torch.no_grad()
def test_transformers_loads_nf4_and_bitsandbytes_decodes_it(encoder_folder, name):
    library = pytest.importorskip("bitsandbytes", reason=NEEDS)
    folder = encoder_folder(name)
    out = exported(folder, "bitsandbytes-nf4")
    exact, found = loaded(folder / "text_encoder"), loaded(out)
    treated = by_kind(found, "Linear4bit")
    assert set(treated) == set(split_linears(read_contents(folder / "text_encoder", None, None)).rounded)
    for layer, module in treated.items():
        weight = exact.get_submodule(layer).weight
        codes, largest = quantize_nf4(weight)
        values = torch.stack([codes[:, 0] >> 4, codes[:, 0] & 15], 1).flatten().long()
        decoded = (LEVELS[values] * largest.repeat_interleave(BLOCK)).view(weight.shape)
        theirs = library.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert torch.equal(theirs, decoded.bfloat16()), layer
        weight.copy_(decoded)
    output, expected = found(IDS)[0].float(), exact(IDS)[0]
    assert (output - expected).norm() < 0.03 * expected.norm()  # bfloat16


@pytest.mark.parametrize("name", ["CLIPTextModelWithProjection", "T5EncoderModel"])
@torch.no_grad()
def test_transformers_loads_torchao(encoder_folder, name):
    pytest.importorskip("torchao", reason="torchao is not installed")
    folder = encoder_folder(name)
    out = exported(folder, "torchao")
    exact, found = loaded(folder / "text_encoder"), loaded(out, dtype=torch.float32)
    treated = {layer for layer, module in by_kind(found, "Linear").items() if hasattr(module.weight, "qdata")}
    assert treated == set(split_linears(read_contents(folder / "text_encoder", None, None)).rounded)
    for layer in treated:
        codes, scale = round_rows(exact.get_submodule(layer).weight)
        weight = found.get_submodule(layer).weight
        assert torch.equal(weight.qdata, codes), layer
        assert torch.equal(weight.scale, scale), layer
        exact.get_submodule(layer).weight.copy_(codes * scale)
    output, expected = found(IDS)[0], exact(IDS)[0]
    assert (output - expected).norm() < 0.02 * expected.norm()  # its products are bfloat16


@pytest.mark.parametrize(("form", "library"), [("bitsandbytes-nf4", "bitsandbytes"), ("torchao", "torchao")])
@torch.no_grad()
def test_files_of_published_checkpoints_have_another_name_in_front(encoder_folder, form, library):
    folder = encoder_folder("CLIPTextModel")
    file = folder / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    out = exported(folder, form)
    codes = [name for name, tensor in load_file(out / "model.safetensors").items() if tensor.dtype in CODES]
    assert codes
    assert all(name.startswith("text_model.encoder.layers.") for name in codes)
    pytest.importorskip(library, reason=f"{library} is not installed")
    found, exact = loaded(out), loaded(folder / "text_encoder")
    kinds = {type(layer.weight).__name__ for layer in found.modules() if isinstance(layer, torch.nn.Linear)}
    assert kinds == {"Int8Tensor" if form == "torchao" else "Params4bit"}
    expected = exact(IDS)[0]
    assert (found(IDS)[0].float() - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize("form", ["bitsandbytes-int8", "bitsandbytes-nf4"])
@torch.no_grad()
def test_a_pipeline_whose_denoiser_stays_float_draws_with_it(flux_folder, tmp_path, form):
    pytest.importorskip("bitsandbytes", reason=NEEDS)
    folder = shutil.copytree(flux_folder, tmp_path / "flux")
    out = exported(folder, form, "text_encoder_2").parent
    dtype = json.loads((out / "dacc_export.json").read_text())["components"]["text_encoder_2"]["dtype"]
    assert f"dtype=torch.{dtype}" in (out / "README.md").read_text()
    pipe = DiffusionPipeline.from_pretrained(out, dtype=getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)
    exact = DiffusionPipeline.from_pretrained(folder).encode_prompt("a red circle", None, max_sequence_length=16)[0]
    states = pipe.encode_prompt("a red circle", None, max_sequence_length=16)[0].float()
    assert 0 < (states - exact).norm() < 0.2 * exact.norm()
    options = {"num_inference_steps": 1, "max_sequence_length": 16, "height": 32, "width": 32, "output_type": "pt"}
    assert torch.isfinite(pipe("a red circle", **options).images).all()


def test_beside_a_bundles_denoiser_it_is_the_text_encoder_of_the_bundle(bundle, flux_folder, tmp_path):
    small = bundle(flux_folder, bits=4)
    theirs = tmp_path / flux_folder.name / "text_encoder_2" / "model.safetensors"  # of the float reference
    tensors = load_file(theirs)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, theirs, {"format": "pt"})
    config = ExportConfig(format="bitsandbytes-nf4", component=("transformer", "text_encoder_2"))
    folder = export_pipeline(small, config, output="out")
    record = json.loads((folder / "dacc_export.json").read_text())
    assert record["weights"] == "rounded anew from the float reference"
    assert record["components"]["text_encoder_2"]["layers"] == 5
    found = load_file(folder / "text_encoder_2" / "model.safetensors")
    layer = "encoder.block.0.layer.0.SelfAttention.q.weight"
    assert torch.equal(found[f"{layer}.absmax"], quantize_nf4(tensors[layer])[1])
    assert found["encoder.block.0.layer.1.DenseReluDense.wo.weight"].dtype == torch.bfloat16


def test_what_transformers_does_not_know_is_refused(encoder_folder):
    folder = encoder_folder("T5EncoderModel")
    file = folder / "text_encoder" / "model.safetensors"
    tensors = {name.replace("block", "layers"): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UnsupportedError, match=r"no encoder\.block\.0.*weight in its files.*safetensors-bf16"):
        exported(folder, "bitsandbytes-nf4")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("T5EncoderModel", "NewEncoderModel"))
    with pytest.raises(UnsupportedError, match="NewEncoderModel, no model of transformers"):
        exported(folder, "bitsandbytes-nf4")


def test_a_config_of_something_else_is_refused(encoder_folder):
    folder = encoder_folder("T5EncoderModel")
    (folder / "text_encoder" / "config.json").write_text('{"d_model": "wide"}')
    with pytest.raises(ModelError, match="does not describe a T5EncoderModel"):
        exported(folder, "bitsandbytes-nf4")


def test_the_advice_names_the_formats_that_hold_text_encoders(sd_folder):
    with pytest.raises(UnsupportedError, match=r"bitsandbytes-int8, bitsandbytes-nf4, safetensors-bf16, torchao"):
        export_pipeline(sd_folder, ExportConfig(format="gguf", component=("text_encoder",)))
