"""PixArt-alpha and -sigma: one adaLN-single for all blocks."""

from . import Family

FAMILY = Family(
    name="pixart",
    denoisers=("PixArtTransformer2DModel",),
    edge=("pos_embed.proj", "proj_out"),
    embedders=("adaln_single.emb",),
    temporal=("adaln_single.emb.*",),
    modulation=("adaln_single.linear",),
    text=("caption_projection.*", "*.attn2.to_[kv]"),
    blocks=("BasicTransformerBlock",),
    stacks=("transformer_blocks",),
)
