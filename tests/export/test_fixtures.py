"""Exports that were committed once are read by the programs that they are for; `fixtures/make.py` made them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file

FIXTURES = Path(__file__).resolve().parent / "fixtures"
WEIGHTS = "diffusion_pytorch_model.safetensors"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def expected():
    tensors = load_file(FIXTURES / "expected.safetensors")
    return {name: tensors[name] for name in ("sample", "timestep")}, tensors["output"]


def plain(tensors):
    """The model with these float tensors."""
    model = UNet2DModel.from_config(UNet2DModel.load_config(FIXTURES / "safetensors-bf16"))
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model


def by_diffusers(name):
    return UNet2DModel.from_pretrained(FIXTURES / name, torch_dtype=torch.float32)


def by_quanto(name):
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    return by_diffusers(name)


def by_torchao(name):
    pytest.importorskip("torchao", reason="torchao is not installed")
    return by_diffusers(name)


def by_gguf(name):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    (file,) = (FIXTURES / name).glob("*.gguf")
    tensors = gguf.GGUFReader(file).tensors
    return plain(
        {
            entry.name: torch.from_numpy(gguf.quants.dequantize(entry.data, entry.tensor_type).copy())
            for entry in tensors
        }
    )


def by_bitsandbytes_int8(name):
    functional = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").functional
    tensors = load_file(FIXTURES / name / WEIGHTS)
    for layer in [key.removesuffix(".SCB") for key in tensors if key.endswith(".SCB")]:
        tensors[f"{layer}.weight"] = functional.int8_vectorwise_dequant(
            tensors[f"{layer}.weight"], tensors.pop(f"{layer}.SCB")
        )
        assert tensors.pop(f"{layer}.weight_format") == 0
    return plain(tensors)


def by_bitsandbytes_nf4(name):
    library = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    tensors = load_file(FIXTURES / name / WEIGHTS)
    for weight in [key.removesuffix(".absmax") for key in tensors if key.endswith(".absmax")]:
        stats = {key: tensors.pop(key) for key in list(tensors) if key.startswith(f"{weight}.")}
        parameter = library.nn.Params4bit.from_prequantized(tensors[weight], stats, device="cpu")
        tensors[weight] = library.functional.dequantize_4bit(parameter.data, parameter.quant_state)
    return plain(tensors)


CASES = {
    "safetensors-bf16": (by_diffusers, 0.02),
    "safetensors-fp8": (by_diffusers, 0.2),
    "gguf": (by_gguf, 0.02),
    "quanto": (by_quanto, 0.02),
    "torchao": (by_torchao, 0.02),
    "bitsandbytes-int8": (by_bitsandbytes_int8, 0.02),
    "bitsandbytes-nf4": (by_bitsandbytes_nf4, 0.2),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_committed_export_still_gives_what_it_gave(name):
    read, close = CASES[name]
    inputs, output = expected()
    found = read(name)(**inputs).sample
    assert (found - output).norm() < close * output.norm()


def test_a_committed_graph_still_gives_what_it_gave():
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    inputs, output = expected()
    session = runtime.InferenceSession(str(FIXTURES / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    assert (torch.from_numpy(found) - output).norm() < 0.02 * output.norm()
