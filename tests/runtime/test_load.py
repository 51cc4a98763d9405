import json
import shutil

import pytest
import torch

import dacc
from dacc.core.errors import BundleError, ConfigError, ModelError
from dacc.runtime.layers import QuantizedLayer
from dacc.runtime.load import load_source, pick_device, pick_dtype


def quantized_layers(model):
    return [module for module in model.modules() if isinstance(module, QuantizedLayer)]


@pytest.mark.parametrize(("kind", "name"), [("unet_folder", "unet"), ("dit_folder", "transformer")])
def test_a_plain_pipeline_and_a_bundle_load_alike(kind, name, request, bundle_of):
    plain = dacc.load(request.getfixturevalue(kind), device="cpu")
    bundle = dacc.load(str(bundle_of(request.getfixturevalue(kind), bits=4)), device="cpu")
    assert type(plain) is type(bundle)
    assert not quantized_layers(getattr(plain, name))
    assert quantized_layers(getattr(bundle, name))
    assert getattr(plain, name).dtype == getattr(bundle, name).dtype == torch.float32
    assert not getattr(bundle, name).training


@pytest.mark.parametrize("prefer", ["memory", "speed"])
@torch.no_grad()
def test_the_preference_reaches_every_layer(unet_folder, bundle_of, prefer):
    unet = dacc.load(bundle_of(unet_folder, bits=4), device="cpu", prefer=prefer).unet
    layers = quantized_layers(unet)
    assert {layer.prefer for layer in layers} == {prefer}
    packed = sum(layer.memory_bytes() for layer in layers)
    unet(torch.randn(1, 1, 16, 16), 5)
    grown = sum(layer.memory_bytes() for layer in layers)
    assert (grown > packed) == (prefer == "speed")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", torch.bfloat16])
@torch.no_grad()
def test_the_dtype_is_that_of_the_arithmetic(unet_folder, bundle_of, dtype):
    unet = dacc.load(bundle_of(unet_folder, bits=4), device="cpu", dtype=dtype).unet
    expected = getattr(torch, str(dtype).removeprefix("torch."))
    assert unet.dtype == expected
    assert {layer.compute_dtype for layer in quantized_layers(unet)} == {expected}
    assert unet(torch.randn(1, 1, 16, 16, dtype=expected), 5).sample.dtype == expected


def test_auto_is_float32_on_a_cpu_and_float16_on_an_accelerator():
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == torch.float16


def test_unknown_dtypes_and_devices_are_refused_with_advice():
    with pytest.raises(ConfigError, match="'float8' is not known") as caught:
        pick_dtype("float8", torch.device("cpu"))
    assert "bfloat16" in caught.value.mend
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ConfigError, match=f"{device}.* cannot be used") as caught:
            pick_device(device)
        assert "--device cpu" in caught.value.mend


def test_a_damaged_bundle_is_named_file_by_file(unet_folder, bundle_of, tmp_path):
    shutil.copytree(bundle_of(unet_folder, bits=4), tmp_path / "copy")
    weights = tmp_path / "copy/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BundleError, match=r"unet/diffusion_pytorch_model.safetensors"):
        dacc.load(tmp_path / "copy")


def test_truncated_weights_of_a_plain_pipeline_are_refused_before_they_are_mapped(unet_folder, tmp_path):
    shutil.copytree(unet_folder, tmp_path / "copy")
    weights = tmp_path / "copy/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BundleError, match=r"diffusion_pytorch_model.safetensors"):
        load_source(tmp_path / "copy")


def test_what_diffusers_cannot_load_is_told_in_one_line(unet_folder, tmp_path):
    shutil.copytree(unet_folder, tmp_path / "copy")
    index = tmp_path / "copy/model_index.json"
    index.write_text(index.read_text().replace("UNet2DModel", "UNetOfTomorrow"))
    with pytest.raises(ModelError, match="diffusers cannot load copy"):
        dacc.load(tmp_path / "copy")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": "x"}, r"DiTTransformer2DModel can be built from .*transformer/config.json"),
        (None, r"transformer/config.json is not a table"),
    ],
)
def test_a_component_whose_config_is_broken_is_named(dit_folder, tmp_path, change, message):
    shutil.copytree(dit_folder, tmp_path / "copy")
    file = tmp_path / "copy/transformer/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change} if change else []))
    with pytest.raises(ModelError, match=message):
        load_source(tmp_path / "copy")


def test_an_unknown_preference_is_refused(unet_folder):
    with pytest.raises(ConfigError, match="prefer 'fast' is not known") as caught:
        dacc.load(unet_folder, device="cpu", prefer="fast")
    assert caught.value.mend == "Use memory or speed."


def test_there_is_no_such_source(tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        dacc.load(tmp_path / "nowhere")
