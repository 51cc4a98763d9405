"""Families are data, so a typo would pass in silence: every pattern is held against the real classes of diffusers."""

from fnmatch import fnmatchcase

import diffusers
import pytest
import torch

from dacc.core.families import find_family
from dacc.core.pipeline import walk_layers

SMALL_UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
MODELS = {
    "UNet2DModel": {
        **SMALL_UNET,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "num_class_embeds": 10,
    },
    "UNet2DConditionModel": {
        **SMALL_UNET,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 8,
        "attention_head_dim": 4,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 56,
        "class_embed_type": "timestep",
        "encoder_hid_dim": 8,
    },
    "UNet3DConditionModel": {
        **SMALL_UNET,
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        "cross_attention_dim": 8,
        "attention_head_dim": 4,
    },
    "UNetMotionModel": {
        **SMALL_UNET,
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
        "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
        "cross_attention_dim": 8,
        "num_attention_heads": 2,
        "motion_num_attention_heads": 2,
    },
    "UNetSpatioTemporalConditionModel": {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        "cross_attention_dim": 8,
        "num_attention_heads": (2, 4),
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24,
    },
    "DiTTransformer2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "num_layers": 1,
        "sample_size": 8,
        "norm_num_groups": 4,
    },
    "PixArtTransformer2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 1,
        "sample_size": 8,
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
        "caption_channels": 8,
    },
    "SD3Transformer2DModel": {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 8,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 8,
        "pos_embed_max_size": 8,
    },
    "FluxTransformer2DModel": {
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 8,
        "pooled_projection_dim": 8,
        "guidance_embeds": True,
        "axes_dims_rope": (2, 2, 4),
    },
}
ABSENT = {  # patterns that this class has no layer for
    "UNet2DModel": {"add_embedding.*", "encoder_hid_proj", "*.attentions.*.attn2.to_[kv]"},
    "UNet3DConditionModel": {"add_embedding.*", "class_embedding*", "encoder_hid_proj"},
    "UNetMotionModel": {"add_embedding.*", "class_embedding*", "encoder_hid_proj"},
    "UNetSpatioTemporalConditionModel": {"class_embedding*", "encoder_hid_proj"},
}
ROLES = [
    ("UNet2DModel", "conv_in", "edge"),
    ("UNet2DModel", "conv_out", "edge"),
    ("UNet2DModel", "time_embedding.linear_1", "temporal"),
    ("UNet2DModel", "class_embedding", "temporal"),
    ("UNet2DModel", "down_blocks.0.resnets.0.time_emb_proj", "temporal"),
    ("UNet2DModel", "down_blocks.0.resnets.0.conv1", "body"),
    ("UNet2DConditionModel", "add_embedding.linear_2", "temporal"),
    ("UNet2DConditionModel", "class_embedding.linear_1", "temporal"),
    ("UNet2DConditionModel", "down_blocks.0.attentions.0.proj_in", "body"),
    ("UNet2DConditionModel", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "text"),
    ("UNet2DConditionModel", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q", "body"),
    ("UNet2DConditionModel", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v", "body"),
    ("UNet2DConditionModel", "encoder_hid_proj", "text"),
    ("UNet3DConditionModel", "down_blocks.0.temp_convs.0.conv1.2", "body"),
    ("UNetMotionModel", "down_blocks.0.motion_modules.0.proj_in", "body"),
    ("UNetMotionModel", "down_blocks.0.motion_modules.0.transformer_blocks.0.attn2.to_v", "body"),
    ("UNetMotionModel", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v", "text"),
    ("UNetSpatioTemporalConditionModel", "down_blocks.0.resnets.0.temporal_res_block.time_emb_proj", "temporal"),
    ("DiTTransformer2DModel", "pos_embed.proj", "edge"),
    ("DiTTransformer2DModel", "proj_out_1", "edge"),
    ("DiTTransformer2DModel", "transformer_blocks.0.norm1.emb.class_embedder.embedding_table", "temporal"),
    ("DiTTransformer2DModel", "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1", "temporal"),
    ("DiTTransformer2DModel", "transformer_blocks.0.norm1.linear", "modulation"),
    ("DiTTransformer2DModel", "transformer_blocks.0.attn1.to_q", "body"),
    ("PixArtTransformer2DModel", "adaln_single.emb.timestep_embedder.linear_1", "temporal"),
    ("PixArtTransformer2DModel", "adaln_single.linear", "modulation"),
    ("PixArtTransformer2DModel", "caption_projection.linear_1", "text"),
    ("PixArtTransformer2DModel", "transformer_blocks.0.attn2.to_v", "text"),
    ("SD3Transformer2DModel", "time_text_embed.text_embedder.linear_1", "temporal"),
    ("SD3Transformer2DModel", "transformer_blocks.0.norm1_context.linear", "modulation"),
    ("SD3Transformer2DModel", "transformer_blocks.1.norm1_context.linear", "modulation"),
    ("SD3Transformer2DModel", "norm_out.linear", "edge"),
    ("FluxTransformer2DModel", "time_text_embed.guidance_embedder.linear_1", "temporal"),
    ("FluxTransformer2DModel", "single_transformer_blocks.0.norm.linear", "modulation"),
    ("FluxTransformer2DModel", "single_transformer_blocks.0.proj_out", "body"),
    ("FluxTransformer2DModel", "x_embedder", "edge"),
]


EMBEDDERS = {  # modules whose sum is the embedding of time and class
    "UNet2DModel": {"time_embedding", "class_embedding"},
    "UNet2DConditionModel": {"time_embedding", "add_embedding", "class_embedding"},
    "UNet3DConditionModel": {"time_embedding"},
    "UNetMotionModel": {"time_embedding"},
    "UNetSpatioTemporalConditionModel": {"time_embedding", "add_embedding"},
    "DiTTransformer2DModel": {"transformer_blocks.0.norm1.emb"},
    "PixArtTransformer2DModel": {"adaln_single.emb"},
    "SD3Transformer2DModel": {"time_text_embed"},
    "FluxTransformer2DModel": {"time_text_embed"},
}


@pytest.fixture(scope="module")
def models():
    """Each class, built tiny on the meta device."""
    with torch.device("meta"):
        return {name: getattr(diffusers, name)(**fields) for name, fields in MODELS.items()}


@pytest.fixture(scope="module")
def layers(models):
    """Layer names of each class."""
    return {name: [layer for layer, _ in walk_layers(model)] for name, model in models.items()}


def test_every_class_that_a_family_names_is_tried_here():
    named = {name for model in MODELS for name in find_family(model)[0].denoisers}
    assert named == set(MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_every_pattern_matches_a_real_layer(model, layers):
    family, known = find_family(model)
    assert known
    for pattern in (*family.edge, *family.temporal, *family.modulation, *family.text, *family.sensitive):
        found = any(fnmatchcase(name, pattern) for name in layers[model])
        assert found != (pattern in ABSENT.get(model, ())), pattern


@pytest.mark.parametrize("model", MODELS)
def test_embedders_are_the_modules_that_embed_time_and_class(model, models):
    family, modules = find_family(model)[0], dict(models[model].named_modules())
    found = {name for name in modules if any(fnmatchcase(name, glob) for glob in family.embedders)}
    assert found == EMBEDDERS[model]
    for name in found:
        inside = [layer for layer, _ in walk_layers(modules[name])]
        assert inside
        assert {family.role(f"{name}.{layer}".rstrip(".")) for layer in inside} == {"temporal"}
        assert all(family.is_embedder(f"{name}.{layer}".rstrip(".")) for layer in inside)
    rest = [layer for layer, _ in walk_layers(models[model]) if not any(layer.startswith(name) for name in found)]
    assert rest
    assert not any(family.is_embedder(layer) for layer in rest)


def test_where_no_embedders_are_named_all_temporal_layers_count():
    family = find_family("SomethingNewTransformer2DModel")[0]
    assert family.is_embedder("time_embed.linear_1")
    assert not family.is_embedder("blocks.0.attn.to_q")


@pytest.mark.parametrize("model", MODELS)
def test_blocks_are_classes_that_the_model_is_built_of(model, models):
    family, classes = find_family(model)[0], {type(module).__name__ for module in models[model].modules()}
    assert any(fnmatchcase(kind, glob) for kind in classes for glob in family.blocks)


@pytest.mark.parametrize(("model", "layer", "role"), ROLES)
def test_known_layers_have_their_role(model, layer, role, layers):
    assert layer in layers[model]
    assert find_family(model)[0].role(layer) == role


@pytest.mark.parametrize("model", MODELS)
def test_each_model_is_mostly_body_with_few_edges(model, layers):
    roles = [find_family(model)[0].role(name) for name in layers[model]]
    assert 2 <= roles.count("edge") <= 4
    assert roles.count("temporal") >= 2
    assert roles.count("body") >= len(roles) / 3


@pytest.mark.parametrize("model", [name for name in MODELS if name.endswith("TransformerModel") or "Tra" in name])
def test_guessing_from_names_agrees_on_transformers(model, layers):
    generic, known = find_family("SomethingNewTransformer2DModel")
    assert not known
    sure = find_family(model)[0]
    wrong = [name for name in layers[model] if generic.role(name) != sure.role(name)]
    assert not wrong


def test_guessing_from_names_agrees_on_unets(layers):
    generic, sure = find_family("UNetOfTomorrow")[0], find_family("UNet2DConditionModel")[0]
    assert [generic.role(name) for name in layers["UNet2DConditionModel"]] == [
        sure.role(name) for name in layers["UNet2DConditionModel"]
    ]


@pytest.mark.parametrize(
    ("name", "latent_layers"),
    [
        ("AutoencoderKL", {"quant_conv", "post_quant_conv"}),
        ("AutoencoderKLCogVideoX", set()),  # its convolutions lie one level deeper
        ("AutoencoderKLWan", {"quant_conv", "post_quant_conv"}),
    ],
)
def test_the_edges_of_autoencoders_are_the_first_and_last_layers_of_both_halves(name, latent_layers):
    with torch.device("meta"):
        layers = [layer for layer, _ in walk_layers(getattr(diffusers, name)())]
    edges = {layer.removesuffix(".conv") for layer in layers if find_family(name)[0].role(layer) == "edge"}
    halves = {f"{half}.{end}" for half in ("encoder", "decoder") for end in ("conv_in", "conv_out")}
    assert edges == halves | latent_layers
