"""Stable Diffusion 3: joint attention over text and image, adaLN for both streams."""

from . import Family

FAMILY = Family(
    name="sd3",
    denoisers=("SD3Transformer2DModel",),
    edge=("pos_embed.proj", "context_embedder", "norm_out.linear", "proj_out"),
    embedders=("time_text_embed",),
    temporal=("time_text_embed.*",),
    modulation=("*.norm1.linear", "*.norm1_context.linear"),
    blocks=("JointTransformerBlock",),
    stacks=("transformer_blocks",),
)
