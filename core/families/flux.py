"""Flux: double blocks (two streams), then single blocks."""

from . import Family

FAMILY = Family(
    name="flux",
    denoisers=("FluxTransformer2DModel",),
    edge=("x_embedder", "context_embedder", "norm_out.linear", "proj_out"),
    embedders=("time_text_embed",),
    temporal=("time_text_embed.*",),
    modulation=("*.norm1.linear", "*.norm1_context.linear", "single_transformer_blocks.*.norm.linear"),
    blocks=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
    stacks=("transformer_blocks", "single_transformer_blocks"),
)
