"""Convolutional UNets of diffusers, with and without cross-attention, for images and video."""

from . import Family

FAMILY = Family(
    name="unet",
    denoisers=(
        "UNet2DModel",
        "UNet2DConditionModel",
        "UNet3DConditionModel",
        "UNetMotionModel",
        "UNetSpatioTemporalConditionModel",
    ),
    edge=("conv_in", "conv_out"),
    embedders=("time_embedding", "add_embedding", "class_embedding"),
    temporal=("time_embedding.*", "add_embedding.*", "class_embedding*", "*.time_emb_proj"),
    text=("encoder_hid_proj", "*.attentions.*.attn2.to_[kv]"),
    blocks=("ResnetBlock2D", "BasicTransformerBlock", "Attention", "TemporalConvLayer"),
    sensitive=("*.conv_shortcut", "*.downsamplers.*"),
)
