"""Modules that pass on what enters them, and components that are loaded with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformerBlock
from torch import nn

import dacc
from dacc.core.errors import BundleError
from dacc.core.treatable import identity_config, identity_modules_of, quantized_by
from dacc.runtime.passthrough import Passthrough, entering, main_stream, running_instead, skipping
from dacc.runtime.skeleton import build_skeleton


def test_it_gives_back_the_streams_of_a_block_in_the_order_of_the_block():
    picture, text, time = torch.ones(1, 2), torch.zeros(1, 3), torch.full((1, 1), 5.0)
    flux = FluxTransformerBlock(16, 2, 8)
    first, second = Passthrough.like(flux)(hidden_states=picture, encoder_hidden_states=text, temb=time)
    assert first is text
    assert second is picture
    video = HunyuanVideoTransformerBlock(2, 8, 2.0)
    first, second = Passthrough.like(video)(picture, text, time)
    assert first is picture
    assert second is text
    assert entering(flux, (), {"hidden_states": picture, "encoder_hidden_states": text}) is picture
    assert main_stream(flux, (text, picture)) is picture
    assert main_stream(video, (picture, text)) is picture


def test_it_drops_the_channels_of_a_skip_connection_and_makes_tuples_where_they_are_asked_for():
    both = torch.cat([torch.ones(1, 4, 2, 2), torch.zeros(1, 3, 2, 2)], dim=1)
    resnet = ResnetBlock2D(in_channels=7, out_channels=4, temb_channels=None, groups=1)
    assert torch.equal(Passthrough.like(resnet)(both, None), torch.ones(1, 4, 2, 2))
    assert torch.equal(Passthrough.like(resnet)(input_tensor=both), torch.ones(1, 4, 2, 2))
    plain = Passthrough(("hidden_states", "return_dict"), ("hidden_states",))
    assert plain(both) is both
    assert plain(both, return_dict=False)[0] is both


def test_skipping_ends_with_its_block_also_after_an_error():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    wanted = network(torch.ones(1, 2))
    with skipping(network, ["0", "1"]):
        assert torch.equal(network(torch.ones(1, 2)), torch.ones(1, 2))
        with pytest.raises(RuntimeError), skipping(network, ["0"]):
            network(torch.ones(1, 3) @ torch.ones(2, 1))
        assert torch.equal(network(torch.ones(1, 2)), torch.ones(1, 2))
    assert torch.equal(network(torch.ones(1, 2)), wanted)


def test_a_forward_that_stood_in_for_another_comes_back():
    linear, values = nn.Linear(2, 2), torch.tensor([[-1.0, 2.0]])
    linear.forward = own = torch.neg
    with running_instead({linear: torch.relu}):
        assert torch.equal(linear(values), torch.relu(values))
    assert vars(linear)["forward"] is own


def without(source: Path, target: Path, name: str, weights: str) -> Path:
    """A pipeline whose denoiser has an identity module; `weights` of it are taken out of the file."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(source, target)) / "unet"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": identity_config([name])}))
    file = folder / "diffusion_pytorch_model.safetensors"
    left = {key: value for key, value in load_file(file).items() if not key.startswith(weights)}
    save_file(left, file, {"format": "pt"})
    return target


def test_a_component_without_a_module_loads_and_counts_as_float(unet_folder, tmp_path):
    folder = without(unet_folder, tmp_path / "pipe", "mid_block", "mid_block.")
    assert quantized_by(folder / "unet") is None
    assert identity_modules_of(folder / "unet") == ["mid_block"]
    unet = dacc.load(folder, device="cpu").unet
    assert isinstance(unet.mid_block, Passthrough)
    skeleton = build_skeleton(folder / "unet")
    assert {name for name, _ in skeleton.named_parameters()} == {name for name, _ in unet.named_parameters()}


@pytest.mark.parametrize(
    ("name", "weights", "told"), [("middle", "mid_block.", "middle"), ("mid_block", "nothing", "left over mid_block")]
)
def test_a_config_that_does_not_fit_the_file_is_refused(unet_folder, tmp_path, name, weights, told):
    folder = without(unet_folder, tmp_path / "pipe", name, weights)
    with pytest.raises(BundleError, match=told):
        dacc.load(folder, device="cpu")
