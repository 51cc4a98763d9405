"""Where blocks lie in each class of denoisers and which fields of its config count them. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# of a stage of a U-Net, one entry for each layer, in the order in which they run
LAYER_LISTS = ("resnets", "temp_convs", "attentions", "temp_attentions", "motion_modules")


@dataclass(frozen=True)
class Stack:
    """A list of transformer blocks of equal build.

    Args:
        path: dotted name of the list.
        count: field of the config that says how many there are.
        first: None, or the part of the first block that the network itself reads; that block is not removed.
        last: whether the class builds the last block in another way, so that it is not removed.
        mirrored: whether block i hands what it computes to block n - 1 - i, so that both go together.
        places: field of the config that lists places of some blocks.
    """

    path: str
    count: str
    first: str | None = None
    last: bool = False
    mirrored: bool = False
    places: str | None = None


@dataclass(frozen=True)
class UnetKind:
    """What the config of a class of U-Nets can say of its stages.

    Args:
        per_stage: `layers_per_block` may differ between stages.
        middle: field that takes the middle block away when it is null; None: the class always builds one.
        depth: whether the number of transformer blocks in each attention can be told.
        can_drop_stage: whether the innermost stage can go, where the one before it is as wide.
    """

    per_stage: bool
    middle: str | None = None
    depth: bool = False
    can_drop_stage: bool = False


BLOCKS = Stack("transformer_blocks", "num_layers")
TRANSFORMERS: Mapping[str, tuple[Stack, ...]] = {
    "DiTTransformer2DModel": (Stack("transformer_blocks", "num_layers", first="norm1.emb"),),
    "PixArtTransformer2DModel": (BLOCKS,),
    "LTXVideoTransformer3DModel": (BLOCKS,),
    "CogVideoXTransformer3DModel": (BLOCKS,),
    "QwenImageTransformer2DModel": (BLOCKS,),
    "SanaTransformer2DModel": (BLOCKS,),
    "WanTransformer3DModel": (Stack("blocks", "num_layers"),),
    "SD3Transformer2DModel": (Stack("transformer_blocks", "num_layers", last=True, places="dual_attention_layers"),),
    "FluxTransformer2DModel": (BLOCKS, Stack("single_transformer_blocks", "num_single_layers")),
    "Flux2Transformer2DModel": (BLOCKS, Stack("single_transformer_blocks", "num_single_layers")),
    "HunyuanVideoTransformer3DModel": (BLOCKS, Stack("single_transformer_blocks", "num_single_layers")),
    "HunyuanDiT2DModel": (Stack("blocks", "num_layers", mirrored=True),),
}
UNETS: Mapping[str, UnetKind] = {
    "UNet2DModel": UnetKind(per_stage=False, middle="mid_block_type", can_drop_stage=True),
    "UNet2DConditionModel": UnetKind(per_stage=True, middle="mid_block_type", depth=True, can_drop_stage=True),
    "UNetSpatioTemporalConditionModel": UnetKind(per_stage=True),
    "UNet3DConditionModel": UnetKind(per_stage=False),
    "UNetMotionModel": UnetKind(per_stage=True),
}


def counting_fields(class_name: str) -> tuple[str, ...]:
    """Fields of the config that say how many residuals of a ControlNet a class reads."""
    if class_name in TRANSFORMERS:
        return tuple(stack.count for stack in TRANSFORMERS[class_name])
    return ("down_block_types", "layers_per_block")
