"""The GGUF file against the gguf package's own reader and decoder, and against diffusers' loader."""

from __future__ import annotations

import json

import gguf
import numpy
import pytest
import torch
from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig, UNet2DConditionModel
from safetensors.torch import load_file

from dacc.core.reporter import silent
from dacc.export.api import export_pipeline
from dacc.export.config import ExportConfig
from dacc.export.targets.gguf import GGUFConfig, type_of

TO_Q = "transformer_blocks.0.attn.to_q.weight"


def exported(source, output="out", **settings):
    folder = export_pipeline(source, ExportConfig(format="gguf", settings=settings), output=output)
    (record,) = json.loads((folder / "dacc_export.json").read_text())["components"].values()
    return folder, folder / record["file"]


def tensors_of(file):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def nearest_q4_0(row):
    """Q4_0 of 32 values as its definition says: the value of largest magnitude gets the code -8."""
    extreme = row[numpy.abs(row).argmax()]
    scale = extreme / -8
    codes = numpy.clip(numpy.floor(row * (1 / scale if scale else 0) + 8.5), 0, 15)
    return numpy.float16(scale).astype(numpy.float32) * (codes - 8)


def test_every_tensor_is_there_with_its_shape_and_type(flux_folder):
    _, file = exported(flux_folder, type="q8_0")
    before = load_file(flux_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    after = tensors_of(file)
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert tuple(reversed(tensor.shape.tolist())) == tuple(before[name].shape)
        if tensor.tensor_type.name == "F32":
            assert before[name].ndim == 1
            assert numpy.array_equal(tensor.data, before[name].numpy())
    assert after[TO_Q].tensor_type.name == "Q8_0"
    assert after["x_embedder.weight"].tensor_type.name == "F16"  # first and last layers are not cut into blocks
    assert after["proj_out.weight"].tensor_type.name == "F16"


def test_blocks_hold_what_the_format_defines(flux_folder):
    _, file = exported(flux_folder, type="q4_0")
    before = load_file(flux_folder / "transformer" / "diffusion_pytorch_model.safetensors")[TO_Q].numpy()
    tensor = tensors_of(file)[TO_Q]
    decoded = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    expected = numpy.stack([nearest_q4_0(block) for block in before.reshape(-1, 32)]).reshape(before.shape)
    assert numpy.allclose(decoded, expected, atol=0, rtol=1e-6)


def test_diffusers_loads_it_and_computes_with_the_decoded_weights(flux_folder, flux_pipeline, flux_inputs):
    folder, file = exported(flux_folder, type="q4_1")
    lines = (folder / "README.md").read_text().split("```")[1].removeprefix("python\n").replace("bfloat16", "float32")
    scope = {}
    exec(lines.replace('folder = "..."', f"folder = {str(folder)!r}"), scope)
    found = scope["pipe"].transformer
    assert isinstance(found, FluxTransformer2DModel)
    assert found.transformer_blocks[0].attn.to_q.weight.dtype == torch.uint8  # still packed
    plain = flux_pipeline().transformer
    decoded = {
        name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for name, tensor in tensors_of(file).items()
    }
    plain.load_state_dict(decoded)
    with torch.no_grad():
        outputs = [model(**flux_inputs(torch.float32)).sample for model in (found, plain)]
    # diffusers multiplies codes and scales in float16
    assert (outputs[0] - outputs[1]).norm() < 2e-4 * outputs[1].norm()


@pytest.mark.parametrize(("kind", "close"), [("q4_k", 0.1), ("q5_k", 0.05), ("q6_k", 0.03)])
def test_super_blocks_are_read_by_diffusers(wide_flux_folder, kind, close):
    model = FluxTransformer2DModel.from_pretrained(wide_flux_folder, subfolder="transformer")
    folder, file = exported(wide_flux_folder, type=kind)
    tensor = tensors_of(file)[TO_Q]
    assert tensor.tensor_type.name == kind.upper()
    decoded = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    weight = model.transformer_blocks[0].attn.to_q.weight.detach()
    assert (decoded - weight).norm() < close * weight.norm()
    loaded = FluxTransformer2DModel.from_single_file(
        str(file),
        config=str(folder),
        subfolder="transformer",
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        dtype=torch.float32,
    )
    x = torch.randn(5, 256)
    with torch.no_grad():
        found = loaded.transformer_blocks[0].attn.to_q(x)
        expected = x @ decoded.T + model.transformer_blocks[0].attn.to_q.bias
    assert (found - expected).norm() < 2e-3 * expected.norm()  # codes and scales are multiplied in float16


@pytest.mark.parametrize(("kind", "instead"), [("q4_k", "Q5_0"), ("q5_k", "Q5_1"), ("q6_k", "Q8_0")])
def test_widths_that_no_super_block_divides_have_small_blocks_of_at_least_as_many_bits(flux_folder, kind, instead):
    _, file = exported(flux_folder, type=kind)
    assert tensors_of(file)[TO_Q].tensor_type.name == instead


def test_diffusers_loads_a_unet_of_stable_diffusion(sd_folder, sd_pipeline):
    folder, file = exported(sd_folder, type="q8_0")
    wanted = GGUFQuantizationConfig(compute_dtype=torch.float32)
    unet = UNet2DConditionModel.from_single_file(
        str(file), config=str(folder), subfolder="unet", quantization_config=wanted, dtype=torch.float32
    )
    inputs = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), 5, torch.zeros(1, 3, 32)
    with torch.no_grad():
        found, exact = unet(*inputs).sample, sd_pipeline().unet(*inputs).sample
    assert 0 < (found - exact).norm() < 0.01 * exact.norm()


def test_layers_have_the_bits_that_they_have_in_the_bundle(bundle, flux_folder):
    small = bundle(flux_folder, bits=4, layer_bits=[["*.to_k", 8]])
    _, file = exported(small)
    after = tensors_of(file)
    assert after[TO_Q].tensor_type.name == "Q4_1"
    assert after[TO_Q.replace("to_q", "to_k")].tensor_type.name == "Q8_0"
    assert file.name == "transformer-Q4_1.gguf"


@pytest.mark.parametrize(("bits", "name"), [(2, "Q4_1"), (4, "Q4_1"), (5, "Q5_1"), (6, "Q8_0"), (8, "Q8_0")])
def test_the_type_has_at_least_the_bits(bits, name):
    assert type_of(bits, GGUFConfig()) == name
    assert type_of(bits, GGUFConfig(type="q5_0")) == "Q5_0"


def test_convolutions_stay_float16(unet_folder):
    reporter = silent()
    folder = export_pipeline(unet_folder, ExportConfig(format="gguf"), output="out", reporter=reporter)
    (file,) = (folder / "unet").glob("*.gguf")
    assert tensors_of(file)["mid_block.resnets.0.conv1.weight"].tensor_type.name == "F16"
    assert any("diffusers reads no UNet2DModel" in notice for notice in reporter.notices)


def test_the_same_source_gives_the_same_bytes(flux_folder):
    first, second = (exported(flux_folder, output=name, type="q5_1")[1].read_bytes() for name in ("a", "b"))
    assert first == second


def test_published_names_are_read_by_diffusers_as_those_of_a_published_checkpoint(flux_folder, published_width):
    published_width(32)
    folder, file = exported(flux_folder, type="q8_0", names="original")
    tensors = tensors_of(file)
    fused = tensors["double_blocks.0.img_attn.qkv.weight"]
    assert (fused.tensor_type.name, fused.shape.tolist()) == ("Q8_0", [32, 96])
    fields = gguf.GGUFReader(file).fields
    assert fields["general.architecture"].contents() == "flux"
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0
    wanted = GGUFQuantizationConfig(compute_dtype=torch.float32)
    model = FluxTransformer2DModel.from_single_file(
        str(file), config=str(folder), subfolder="transformer", quantization_config=wanted, dtype=torch.float32
    )
    decoded = torch.from_numpy(gguf.quants.dequantize(fused.data, fused.tensor_type).copy())
    before = load_file(flux_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    x = torch.randn(5, 32)
    attention = model.transformer_blocks[0].attn
    for place, layer in enumerate((attention.to_q, attention.to_k, attention.to_v)):
        with torch.no_grad():
            found = layer(x) - layer.bias
        expected = x @ decoded[32 * place : 32 * place + 32].T
        assert (found - expected).norm() < 2e-3 * expected.norm()
    assert (decoded[:32] - before[TO_Q]).norm() < 0.01 * before[TO_Q].norm()
