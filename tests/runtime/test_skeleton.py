import json

import pytest
from diffusers import UNet2DModel, WanTransformer3DModel
from torch import nn

from dacc.core.errors import ModelError, UnsupportedError
from dacc.runtime.skeleton import build_skeleton, passed_over


@pytest.mark.parametrize(("kind", "name"), [("unet_folder", "unet"), ("dit_folder", "transformer")])
def test_a_skeleton_has_every_parameter_and_no_memory(kind, name, request):
    model = build_skeleton(request.getfixturevalue(kind) / name)
    pipe = request.getfixturevalue(kind.replace("folder", "pipeline"))()
    real = getattr(pipe, name)
    assert type(model) is type(real)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert {key: value.shape for key, value in model.named_parameters()} == {
        key: value.shape for key, value in real.named_parameters()
    }


def test_the_skeleton_of_a_quantized_component_is_the_float_network(unet_folder, bundle_of):
    model = build_skeleton(bundle_of(unet_folder, bits=4) / "unet")
    assert type(model.mid_block.resnets[0].conv1).__name__ == "Conv2d"


@pytest.mark.parametrize("text", [None, "{", "\xff"])
def test_a_config_that_cannot_be_read_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelError, match=r"config.json cannot be read"):
        build_skeleton(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", '"UNet2DModel"', "null"])
def test_a_config_that_is_no_table_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config.json is not a table"):
        build_skeleton(tmp_path)


@pytest.mark.parametrize("field", [{"num_layers": "x"}, {"attention_head_dim": []}, {"patch_size": 0}])
def test_a_config_that_no_model_can_be_built_from_is_named(dit_folder, tmp_path, field):
    config = json.loads((dit_folder / "transformer/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **field}))
    with pytest.raises(ModelError, match=r"no DiTTransformer2DModel can be built from .*config.json") as caught:
        build_skeleton(tmp_path)
    assert caught.value.mend


@pytest.mark.parametrize(
    "config", [{}, {"_class_name": "CLIPTextModel"}, {"_class_name": "DDIMScheduler"}, {"_class_name": "__name__"}]
)
def test_what_is_no_diffusers_model_is_refused(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="not a diffusers model") as caught:
        build_skeleton(tmp_path)
    assert "--component" in caught.value.mend


def test_tensors_that_diffusers_passes_over_are_told_by_the_class():
    names = {"blocks.0.attn2.norm_added_q.weight", "blocks.0.attn2.to_q.weight"}
    assert passed_over(object.__new__(WanTransformer3DModel), names) == {"blocks.0.attn2.norm_added_q.weight"}
    assert passed_over(object.__new__(UNet2DModel), names) == passed_over(nn.Identity(), names) == set()
