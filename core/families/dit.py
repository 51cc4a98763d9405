"""DiT (Peebles & Xie, 2023, arXiv 2212.09748): every block embeds time and class by itself."""

from . import Family

FAMILY = Family(
    name="dit",
    denoisers=("DiTTransformer2DModel",),
    edge=("pos_embed.proj", "proj_out_1", "proj_out_2"),
    embedders=("*.norm1.emb",),
    temporal=("*.norm1.emb.*",),
    modulation=("*.norm1.linear",),
    blocks=("BasicTransformerBlock",),
    stacks=("transformer_blocks",),
)
