"""Autoencoders: every format that takes any diffusers model takes them, and its own library reads the file."""

from __future__ import annotations

import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

import dacc
from dacc.core.errors import UnsupportedError
from dacc.export.api import export_pipeline
from dacc.export.config import ExportConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of the quanto loader of diffusers


def plain(folder, tensors):
    """The model with these float tensors: all that it has, and nothing else."""
    model = AutoencoderKL.from_config(AutoencoderKL.load_config(folder))
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model.eval()


def by_diffusers(folder):
    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval()


def by_gguf(folder):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    (file,) = folder.glob("*.gguf")
    tensors = {}
    for entry in gguf.GGUFReader(file).tensors:
        tensors[entry.name] = torch.from_numpy(gguf.quants.dequantize(entry.data, entry.tensor_type).copy())
    return plain(folder, tensors)


def by_quanto(folder):
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    return by_diffusers(folder)


def by_torchao(folder):
    pytest.importorskip("torchao", reason="torchao is not installed")
    return by_diffusers(folder)


def by_int8(folder):
    functional = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").functional
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    for layer in [name.removesuffix(".SCB") for name in tensors if name.endswith(".SCB")]:
        weight = f"{layer}.weight"
        tensors[weight] = functional.int8_vectorwise_dequant(tensors[weight], tensors.pop(f"{layer}.SCB"))
        del tensors[f"{layer}.weight_format"]
    return plain(folder, tensors)


def by_nf4(folder):
    library = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    for weight in [name.removesuffix(".absmax") for name in tensors if name.endswith(".absmax")]:
        stats = {name: tensors.pop(name) for name in list(tensors) if name.startswith(f"{weight}.")}
        parameter = library.nn.Params4bit.from_prequantized(tensors[weight], stats, device="cpu")
        tensors[weight] = library.functional.dequantize_4bit(parameter.data, parameter.quant_state)
    return plain(folder, tensors)


READERS = {
    "safetensors-bf16": (by_diffusers, 0.02),
    "safetensors-fp8": (by_diffusers, 0.1),
    "gguf": (by_gguf, 0.02),
    "quanto": (by_quanto, 0.02),
    "torchao": (by_torchao, 0.02),
    "bitsandbytes-int8": (by_int8, 0.02),
    "bitsandbytes-nf4": (by_nf4, 0.1),
}


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "bundle"])
@pytest.mark.parametrize("form", READERS)
@torch.no_grad()
def test_an_autoencoder_in_every_format_decodes_as_before(bundle, sd_folder, tmp_path, form, quantized):
    source = bundle(sd_folder, bits=8, component=("vae",)) if quantized else shutil.copytree(sd_folder, tmp_path / "sd")
    folder = export_pipeline(source, ExportConfig(format=form, component=("vae",)), output="out")
    read, close = READERS[form]
    found, exact = read(folder / "vae"), dacc.load(source).vae
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    image, expected = (model.decode(latents).sample for model in (found, exact))
    assert 0 < (image - expected).norm() < close * expected.norm()
    pixels = expected.clamp(-1, 1)
    parts = [model.encode(pixels).latent_dist.mean for model in (found, exact)]
    assert (parts[0] - parts[1]).norm() < close * parts[1].norm()
    assert (folder / "unet" / "config.json").read_bytes() == (source / "unet" / "config.json").read_bytes()


@pytest.mark.parametrize(("form", "advice"), [("onnx", "denoiser"), ("nunchaku-lite", "dacc quantize")])
def test_formats_that_cannot_hold_it_refuse_it(sd_folder, form, advice):
    with pytest.raises(UnsupportedError, match=advice):
        export_pipeline(sd_folder, ExportConfig(format=form, component=("vae",)), output="out")
