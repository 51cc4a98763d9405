"""Bundles with fixed activation scales, written by hand: loaded, run and saved again."""

import copy
import json

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from dacc.core.errors import BundleError
from dacc.core.schedule_id import schedule_id
from dacc.core.scheme import Scheme
from dacc.runtime.activation import ACTIVATION_NAMES, ActivationScale, activation_shapes
from dacc.runtime.clockwork import attach_clock
from dacc.runtime.layers import swap_layers_
from dacc.runtime.step_table import StepTable
from dacc.runtime.weight import QuantizedWeight, state_shapes

WEIGHTS = "diffusion_pytorch_model.safetensors"
SCHEMES = {
    "mid_block.resnets.0.conv1": {"bits": 8, "act_bits": 8, "act_mode": "static"},
    "mid_block.resnets.0.conv2": {"bits": 8, "act_bits": 8, "act_mode": "per-step", "act_steps": 4},
    "up_blocks.0.resnets.0.conv_shortcut": {
        "bits": 4,
        "act_bits": 6,
        "act_mode": "per-step",
        "act_steps": 4,
        "split": 16,
    },
}


def random_tensors(scheme, shape):
    """Codes and scales of a layer that computes something near nothing."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(*scheme.code_range, (shape[0], torch.Size(shape[1:]).numel()), generator=generator)
    scale = torch.full(state_shapes(scheme, shape)["scale"][0], 1e-3)
    rows = activation_shapes(scheme)["act_scale"][0]
    zero_point = torch.randint(0, 2**scheme.act_bits, rows, generator=generator).to(torch.uint8)
    return QuantizedWeight.from_codes(codes, scheme, shape, scale=scale), ActivationScale(
        torch.rand(rows, generator=generator) + 0.01, zero_point
    )


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(fields)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def component(unet_folder, tmp_path):
    """A UNet with fixed activation scales, written by hand."""
    model = UNet2DModel.from_pretrained(unet_folder, subfolder="unet")
    schemes = {name: Scheme(**fields) for name, fields in SCHEMES.items()}
    swap_layers_(model, schemes)
    for name in schemes:
        layer = model.get_submodule(name)
        weight, activation = random_tensors(layer.scheme, layer.weight_shape)
        layer.store_weight(weight)
        layer.store_activation(activation)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(4)
    config = json.loads((unet_folder / "unet" / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "dacc",
        "format": 1,
        "schemes": {scheme.name: scheme.model_dump(mode="json") for scheme in schemes.values()},
        "modules": {name: scheme.name for name, scheme in schemes.items()},
        "steps": {"schedule": schedule_id(scheduler).model_dump(mode="json"), "rule": "nearest"},
    }
    folder = tmp_path / "fixed"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fixed_scales_are_loaded_as_they_are_and_saved_again(component, tmp_path, dtype):
    model, stored = UNet2DModel.from_pretrained(component, dtype=dtype), load_file(component / WEIGHTS)
    for name in SCHEMES:
        layer = model.get_submodule(name)
        for leaf in (*ACTIVATION_NAMES, "scale"):
            assert getattr(layer, leaf).dtype == stored[f"{name}.{leaf}"].dtype
            assert torch.equal(getattr(layer, leaf), stored[f"{name}.{leaf}"])
    model.save_pretrained(tmp_path / "again")
    configs = [json.loads((folder / "config.json").read_text()) for folder in (component, tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    if dtype is torch.float32:
        assert (tmp_path / "again" / WEIGHTS).read_bytes() == (component / WEIGHTS).read_bytes()


def test_a_loaded_pipeline_moves_through_its_per_step_scales(component, unet_pipeline):
    pipe = unet_pipeline()
    pipe.register_modules(unet=UNet2DModel.from_pretrained(component), scheduler=DDIMScheduler())
    attach_clock(pipe)
    table = pipe.unet.get_submodule("mid_block.resnets.0.conv2").step_table
    rows = []
    pipe.unet.mid_block.register_forward_pre_hook(lambda *_: rows.append(table.row()))
    pipe(num_inference_steps=4, output_type="pt")
    assert rows == [0, 1, 2, 3]
    with pytest.warns(UserWarning, match="fitted for 4 DDIMScheduler calls, running 2 on another grid"):
        pipe(num_inference_steps=2, output_type="pt")
    plain = copy.deepcopy(pipe.unet).dequantize()
    assert not any(isinstance(getattr(hook, "__self__", None), StepTable) for hook in plain._forward_pre_hooks.values())


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (None, "the grid of the per-step scales"),
        ({"schedule": {}}, "the grid of the per-step scales"),
        ({"rule": "sometimes"}, "the grid of the per-step scales"),
        ("shorter", r"per-step scales for \[4\] calls and a grid of 3"),
    ],
)
def test_per_step_scales_need_their_grid(component, steps, message):
    if steps == "shorter":
        steps = json.loads((component / "config.json").read_text())["quantization_config"]["steps"]
        steps["schedule"]["timesteps"].pop()
    change_config(component, steps=steps)
    with pytest.raises(BundleError, match=message):
        UNet2DModel.from_pretrained(component)


@pytest.mark.parametrize("fields", [{"split": 4, "act_bits": 16, "act_mode": "none"}, {"act_bits": 12}])
def test_a_scheme_that_no_layer_can_have_is_a_damaged_bundle(component, fields):
    schemes = json.loads((component / "config.json").read_text())["quantization_config"]["schemes"]
    schemes["w8a8-static"].update(fields)
    change_config(component, schemes=schemes)
    with pytest.raises(BundleError, match="a scheme of this model"):
        UNet2DModel.from_pretrained(component)


def test_activation_scales_of_another_shape_are_refused(component):
    key = "mid_block.resnets.0.conv2.act_scale"
    weights = load_file(component / WEIGHTS)
    weights[key] = weights[key][:4].contiguous()
    save_file(weights, component / WEIGHTS)
    with pytest.raises(BundleError, match=rf"{key} has shape \(4, 1\); its scheme needs \(5, 1\)"):
        UNet2DModel.from_pretrained(component)
