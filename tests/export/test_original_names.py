"""Published names, against diffusers' own conversion of published checkpoints."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)

from dacc.core.errors import UnsupportedError
from dacc.export.original_names import original_sources


def flux(guidance):
    sizes = {"attention_head_dim": 8, "num_attention_heads": 1, "axes_dims_rope": (2, 2, 4)}
    counts = {"num_layers": 2, "num_single_layers": 3, "in_channels": 4}
    return FluxTransformer2DModel(
        **sizes, **counts, joint_attention_dim=8, pooled_projection_dim=8, guidance_embeds=guidance
    )


def sd3(**fields):
    return SD3Transformer2DModel(
        sample_size=4, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8, pos_embed_max_size=4, **fields,
    )  # fmt: skip


def published(model):
    state = model.state_dict()
    made = {}
    for name, source in original_sources(type(model).__name__, state.keys()).items():
        values = torch.cat([state[part] for part in source.parts])
        made[name] = torch.cat(values.chunk(2)[::-1]) if source.swapped else values
    return made


@pytest.mark.parametrize(
    ("make", "convert"),
    [
        (lambda: flux(False), convert_flux_transformer_checkpoint_to_diffusers),
        (lambda: flux(True), convert_flux_transformer_checkpoint_to_diffusers),
        (sd3, convert_sd3_transformer_checkpoint_to_diffusers),
        (
            lambda: sd3(qk_norm="rms_norm", dual_attention_layers=(0, 1)),
            convert_sd3_transformer_checkpoint_to_diffusers,
        ),
    ],
    ids=["flux-schnell", "flux-dev", "sd3", "sd3.5-medium"],
)
def test_diffusers_undoes_it(make, convert, published_width):
    published_width(8)
    torch.manual_seed(0)
    model = make()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # no two tensors are equal
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = convert(published(model))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_other_classes_and_other_tensors_are_refused():
    with pytest.raises(UnsupportedError, match="published names of DiTTransformer2DModel are not known"):
        original_sources("DiTTransformer2DModel", {"proj_out.weight"})
    names = {*sd3().state_dict(), "extra.weight"}
    with pytest.raises(UnsupportedError, match=r"extra\.weight of SD3Transformer2DModel has no place"):
        original_sources("SD3Transformer2DModel", names)
