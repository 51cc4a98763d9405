import copy
import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import nn

import dacc
from dacc.core.errors import BundleError
from dacc.runtime.diffusers_quantizer import DaccQuantizationConfig
from dacc.runtime.layers import QuantizedLayer

WEIGHTS = "diffusion_pytorch_model.safetensors"
LOAD = """
import sys
{imports}
from diffusers import DiffusionPipeline, {model}
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
model = {model}.from_pretrained(sys.argv[1], subfolder="{name}")
print(type(pipe.{name}.{layer}).__name__, type(model.{layer}).__name__)
"""
UNET = {"model": "UNet2DModel", "name": "unet", "layer": "mid_block.resnets[0].conv1"}
DIT = {"model": "DiTTransformer2DModel", "name": "transformer", "layer": "transformer_blocks[0].attn1.to_q"}


@pytest.fixture
def unet_bundle(unet_folder, bundle_of):
    return bundle_of(unet_folder, bits=4)


@pytest.fixture
def component(unet_bundle, tmp_path):
    """A copy of the quantized UNet's folder, to be damaged."""
    return shutil.copytree(unet_bundle / "unet", tmp_path / "unet")


def change_weights(folder, change):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(fields)
    (folder / "config.json").write_text(json.dumps(config))


def run_unet(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return model(torch.randn(2, 1, 16, 16, generator=generator).to(model.dtype), 7).sample


def test_plain_diffusers_loads_a_bundle_when_dacc_is_imported_before_it(unet_bundle, run_python):
    done = run_python(LOAD.format(imports="import dacc, diffusers", **UNET), unet_bundle)
    assert done.stdout.split() == ["QuantizedConv2d"] * 2


def test_plain_diffusers_loads_a_bundle_when_dacc_is_imported_after_it_was_used(dit_folder, bundle_of, run_python):
    imports = "from diffusers import UNet2DModel, AutoModel, DiTPipeline\nimport dacc"
    done = run_python(LOAD.format(imports=imports, **DIT), bundle_of(dit_folder, bits=4))
    assert done.stdout.split() == ["QuantizedLinear"] * 2


def test_without_dacc_diffusers_refuses_clearly(unet_bundle, run_python):
    done = run_python(LOAD.format(imports="", **UNET), unet_bundle, check=False)
    assert done.returncode == 1
    assert "Unknown quantization type, got dacc" in done.stderr


@pytest.mark.parametrize("kind", ["unet_folder", "dit_folder"])
def test_what_is_loaded_is_what_the_file_holds(kind, request, bundle_of):
    bundle = bundle_of(request.getfixturevalue(kind), bits=4)
    name, cls = ("unet", UNet2DModel) if kind == "unet_folder" else ("transformer", DiTTransformer2DModel)
    model, stored = cls.from_pretrained(bundle, subfolder=name), load_file(bundle / name / WEIGHTS)
    assert model.state_dict().keys() == stored.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, stored[key].to(value.dtype))
        if key.endswith(("scale", "qweight", "zero_point")):
            assert value.dtype == stored[key].dtype
    assert model.is_quantized
    assert model.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_casts_floats_and_never_scales(unet_bundle, dtype):
    model, stored = (
        UNet2DModel.from_pretrained(unet_bundle, subfolder="unet", dtype=dtype),
        load_file(unet_bundle / "unet" / WEIGHTS),
    )
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLayer):
            assert layer.scale.dtype == stored[f"{name}.scale"].dtype
            assert torch.equal(layer.scale, stored[f"{name}.scale"])
            assert layer.compute_dtype == layer.weight.dtype == dtype
            assert layer.bias is None or layer.bias.dtype == dtype
    assert run_unet(model).dtype == dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("mid_block.resnets.0.conv1.scale"), r"missing mid_block.resnets.0.conv1.scale"),
        (lambda weights: weights.pop("conv_out.bias"), r"missing conv_out.bias"),
        (lambda weights: weights.update(extra=torch.ones(1)), "left over extra"),
        (
            lambda weights: weights.update({"mid_block.resnets.0.conv1.weight": torch.ones(1)}),
            r"left over mid_block.resnets.0.conv1.weight",
        ),
    ],
)
def test_missing_and_extra_tensors_are_named(component, change, message):
    change_weights(component, change)
    with pytest.raises(BundleError, match=message) as caught:
        UNet2DModel.from_pretrained(component)
    assert "dacc verify" in caught.value.mend


def test_extra_tensors_that_diffusers_passes_over_are_no_damage(component, monkeypatch):
    change_weights(component, lambda weights: weights.update({"mid_block.norm_added_q.weight": torch.ones(1)}))
    monkeypatch.setattr(UNet2DModel, "_keys_to_ignore_on_load_unexpected", ["norm_added_q"])  # as of Wan
    assert "mid_block.norm_added_q.weight" not in UNet2DModel.from_pretrained(component).state_dict()


def test_many_missing_tensors_are_counted(component):
    change_weights(component, lambda weights: [weights.pop(key) for key in list(weights) if key.endswith("scale")])
    with pytest.raises(BundleError, match=r"missing .*, .*, .* and \d+ more"):
        UNet2DModel.from_pretrained(component)


@pytest.mark.parametrize("leaf", ["qweight", "scale"])
def test_a_wrong_shape_is_named_with_the_right_one(component, leaf):
    key = f"mid_block.resnets.0.conv1.{leaf}"
    change_weights(component, lambda weights: weights.update({key: weights[key][:, :-1].contiguous()}))
    with pytest.raises(BundleError, match=rf"{key} has shape \(.*\); its scheme needs \(.*\)"):
        UNet2DModel.from_pretrained(component)


@pytest.mark.parametrize("fields", [{"format": 2}, {"rotation": "hadamard"}])
def test_a_newer_format_asks_for_an_upgrade(component, fields):
    change_config(component, **fields)
    with pytest.raises(BundleError, match="This dacc reads up to format 1") as caught:
        UNet2DModel.from_pretrained(component)
    assert "pip install -U" in caught.value.mend


def test_a_config_that_names_no_layer_of_the_model_is_refused(component):
    modules = json.loads((component / "config.json").read_text())["quantization_config"]["modules"]
    change_config(component, modules={**modules, "mid_block.resnets.7.conv1": next(iter(modules.values()))})
    with pytest.raises(BundleError, match=r"mid_block.resnets.7.conv1"):
        UNet2DModel.from_pretrained(component)


def test_a_config_that_names_an_unknown_scheme_is_refused(component):
    change_config(component, schemes={})
    with pytest.raises(BundleError, match="scheme"):
        UNet2DModel.from_pretrained(component)


def test_a_scheme_that_this_dacc_does_not_know_is_refused(component):
    schemes = json.loads((component / "config.json").read_text())["quantization_config"]["schemes"]
    for fields in schemes.values():
        fields["rotation"] = "hadamard"
    change_config(component, schemes=schemes)
    with pytest.raises(BundleError, match="rotation"):
        UNet2DModel.from_pretrained(component)


def test_quantizing_while_loading_is_referred_to_the_command(unet_folder):
    with pytest.raises(BundleError, match="float model") as caught:
        UNet2DModel.from_pretrained(unet_folder, subfolder="unet", quantization_config=DaccQuantizationConfig())
    assert "dacc quantize" in caught.value.mend


@pytest.mark.parametrize("shard", ["10GB", "40KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_bundle_saves_the_same_integers_and_scales(unet_bundle, tmp_path, shard, dtype):
    model = UNet2DModel.from_pretrained(unet_bundle, subfolder="unet", dtype=dtype)
    model.save_pretrained(tmp_path / "again", max_shard_size=shard)
    assert (len(list((tmp_path / "again").glob("*.safetensors"))) > 1) == (shard == "40KB")
    saved = {
        key: value for file in (tmp_path / "again").glob("*.safetensors") for key, value in load_file(file).items()
    }
    before = load_file(unet_bundle / "unet" / WEIGHTS)
    assert saved.keys() == before.keys()
    for key in (key for key in before if key.endswith(("qweight", "scale", "zero_point"))):
        assert saved[key].dtype == before[key].dtype
        assert torch.equal(saved[key], before[key])
    configs = [
        json.loads((folder / "config.json").read_text()) for folder in (unet_bundle / "unet", tmp_path / "again")
    ]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    again = UNet2DModel.from_pretrained(tmp_path / "again", dtype=dtype)
    assert torch.equal(run_unet(again), run_unet(model))


def test_a_whole_pipeline_saves_and_loads_again(dit_folder, bundle_of, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(bundle_of(dit_folder, bits=4))
    pipe.save_pretrained(tmp_path / "again")
    again = DiffusionPipeline.from_pretrained(tmp_path / "again")
    before, after = pipe.transformer.state_dict(), again.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("kind", ["unet_folder", "dit_folder"])
def test_dequantizing_gives_plain_layers_with_the_same_weights(kind, request, bundle_of, tmp_path):
    name = "unet" if kind == "unet_folder" else "transformer"
    model = getattr(dacc.load(bundle_of(request.getfixturevalue(kind), bits=4), device="cpu"), name)
    expected = {layer: module.weight for layer, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    plain = copy.deepcopy(model).dequantize()
    for layer, weight in expected.items():
        module = plain.get_submodule(layer)
        assert type(module) in (nn.Linear, nn.Conv2d, nn.Embedding)
        assert torch.equal(module.weight, weight)
    plain.save_pretrained(tmp_path / "plain")
    again = type(plain).from_pretrained(tmp_path / "plain")
    assert again.state_dict().keys() == plain.state_dict().keys()
    assert not getattr(again, "is_quantized", False)
    if name == "unet":
        for other, most in ((model, 1e-2), (plain, 1e-4)):
            assert (run_unet(again) - run_unet(other)).norm() < most * run_unet(other).norm()


def test_a_model_that_diffusers_quantized_in_memory_can_be_copied(unet_bundle):
    model = UNet2DModel.from_pretrained(unet_bundle, subfolder="unet")
    assert torch.equal(run_unet(copy.deepcopy(model)), run_unet(model))
