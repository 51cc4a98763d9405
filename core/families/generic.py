"""Roles guessed from the names that diffusers uses in most of its models; used, with a notice, for unknown classes."""

from . import Family

FAMILY = Family(
    name="generic",
    denoisers=(),
    edge=(
        "conv_in",
        "conv_out",
        "proj_in",
        "proj_out",
        "proj_out_[12]",
        "pos_embed.proj",
        "patch_embed*",
        "x_embedder*",
        "context_embedder*",
        "norm_out.linear",
        # of autoencoders: both halves have a first and a last layer
        "encoder.conv_in*",
        "encoder.conv_out*",
        "decoder.conv_in*",
        "decoder.conv_out*",
        "quant_conv",
        "post_quant_conv",
    ),
    temporal=(
        "time_embed*",
        "time_text_embed*",
        "timestep_embed*",
        "condition_embedder.time*",
        "add_embedding*",
        "class_embed*",
        "guidance_embed*",
        "adaln_single.emb.*",
        "time_embed.emb.*",
        "*.time_emb_proj",
        "*.norm1.emb.*",
    ),
    modulation=("*.norm*.linear", "*adaln*.linear", "*adaLN*", "*.linear_modulation*"),
    text=("caption_projection.*", "encoder_hid_proj", "*.attn2.to_[kv]"),
    blocks=(
        "*TransformerBlock",
        "ResnetBlock2D",
    ),
)
