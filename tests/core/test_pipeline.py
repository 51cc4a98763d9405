import json

import pytest

from dacc.core.errors import BundleError, ConfigError, ModelError, UnsupportedError
from dacc.core.pipeline import (
    denoiser_names,
    denoisers,
    is_denoiser,
    pipeline_class,
    select_components,
    walk_layers,
)
from dacc.core.source import component_entries


def write_index(folder, **components):
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "P", "_diffusers_version": "1", **components}))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_index(
        tmp_path,
        transformer=["diffusers", "SomeTransformer2DModel"],
        transformer_2=["diffusers", "SomeTransformer2DModel"],
        vae=["diffusers", "AutoencoderKL"],
        text_encoder=["transformers", "CLIPTextModel"],
        safety_checker=[None, None],
        feature_size=3,
    )


def test_components_are_those_with_a_class(folder):
    assert set(component_entries(folder)) == {"transformer", "transformer_2", "vae", "text_encoder"}
    assert pipeline_class(folder) == "P"


def test_a_pipeline_may_have_two_denoisers(folder):
    assert denoiser_names(folder) == ["transformer", "transformer_2"]
    assert select_components(folder, []) == ["transformer", "transformer_2"]


def test_wanted_components_are_taken_once_in_their_order(folder):
    assert select_components(folder, ["vae", "transformer", "vae"]) == ["vae", "transformer"]


def test_an_unknown_component_is_answered_with_the_nearest(folder):
    with pytest.raises(ConfigError, match="has no component 'transfomer'") as caught:
        select_components(folder, ["transfomer"])
    assert caught.value.mend.startswith("Did you mean transformer")


def test_a_pipeline_without_denoiser_is_told_by_its_classes(tmp_path):
    write_index(tmp_path, vae=["diffusers", "AutoencoderKL"])
    with pytest.raises(UnsupportedError, match="vae: AutoencoderKL"):
        denoiser_names(tmp_path)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, ModelError, "model_index.json is missing"),
        ("{", BundleError, "model_index.json"),
        ("[]", ModelError, "is not a table of components"),
        ("\xff", BundleError, "model_index.json"),
    ],
)
def test_an_index_that_cannot_be_read_is_refused(tmp_path, text, error, message):
    if text is not None:
        (tmp_path / "model_index.json").write_text(text, encoding="latin-1")
    with pytest.raises(error, match=message):
        component_entries(tmp_path)


@pytest.mark.parametrize(
    ("name", "library", "class_name", "expected"),
    [
        ("unet", "diffusers", "UNet2DModel", True),
        ("net", "diffusers", "UNetMotionModel", True),
        ("model", "diffusers", "DiTTransformer2DModel", True),
        ("prior", "diffusers", "PriorTransformer", True),
        ("decoder", "diffusers", "StableCascadeUNet", True),
        ("vae", "diffusers", "AutoencoderKL", False),
        ("controlnet", "diffusers", "ControlNetModel", False),
        ("unet", "my_package", "UNet2DModel", False),
        ("text_encoder", "transformers", "CLIPTextModel", False),
    ],
)
def test_denoisers_are_known_by_class_or_role(name, library, class_name, expected):
    assert is_denoiser(name, library, class_name) is expected


@pytest.mark.parametrize(("kind", "name"), [("unet_pipeline", "unet"), ("dit_pipeline", "transformer")])
def test_a_loaded_pipeline_gives_its_denoisers(request, kind, name):
    assert list(denoisers(request.getfixturevalue(kind)())) == [name]


def test_every_layer_with_a_weight_matrix_is_walked(dit_pipeline):
    names = dict(walk_layers(dit_pipeline().transformer))
    assert "pos_embed.proj" in names  # convolution
    assert "transformer_blocks.0.attn1.to_out.0" in names  # linear
    assert "transformer_blocks.1.norm1.emb.class_embedder.embedding_table" in names  # embedding
    assert not any(name.endswith("norm3") for name in names)
