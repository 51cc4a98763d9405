"""Layers that read two tensors joined along their channels: their inputs have two very different ranges.

In a UNet the skip convolution of an up block reads the deep features beside those that the way down left (Q-Diffusion:
Li et al., 2023, arXiv 2302.04304, section 4.3); in Flux the last linear of a single block reads attention beside the
feed-forward product.
"""

from __future__ import annotations

from itertools import chain

from torch import nn

from ..runtime.passthrough import Passthrough


def find_splits(model: nn.Module) -> dict[str, int]:
    """Layer name -> input channels of the first of the two tensors."""
    return dict(chain(_shortcuts(model), _joined_streams(model)))


def _shortcuts(model: nn.Module) -> list[tuple[str, int]]:
    """Skip convolutions of the up blocks: before them come the features of the residual block that ran last."""
    found: list[tuple[str, int]] = []
    before = [*getattr(model, "down_blocks", []), getattr(model, "mid_block", None)]
    widths = [_width(resnet) for stage in before for resnet in getattr(stage, "resnets", [])]
    deep = widths[-1] if widths else None
    for number, block in enumerate(getattr(model, "up_blocks", [])):
        for index, resnet in enumerate(getattr(block, "resnets", [])):
            inside = "spatial_res_block." if hasattr(resnet, "spatial_res_block") else ""
            shortcut = getattr(_spatial(resnet), "conv_shortcut", None)
            if isinstance(shortcut, nn.Conv2d) and deep and 0 < deep < shortcut.in_channels:
                found.append((f"up_blocks.{number}.resnets.{index}.{inside}conv_shortcut", deep))
            deep = _width(resnet)
    return found


def _spatial(resnet: nn.Module) -> nn.Module:
    """Of a residual block for video the half that reads what enters it."""
    return getattr(resnet, "spatial_res_block", resnet)


def _width(resnet: nn.Module) -> int | None:
    """Channels that a residual block gives, or what stands in its place; None where it does not say."""
    if isinstance(resnet, Passthrough):
        return resnet.channels
    width = getattr(_spatial(resnet), "out_channels", None)
    return width if isinstance(width, int) else None


def _joined_streams(model: nn.Module) -> list[tuple[str, int]]:
    found = []
    for number, block in enumerate(getattr(model, "single_transformer_blocks", [])):
        joined, inner = getattr(block, "proj_out", None), getattr(block, "proj_mlp", None)
        if isinstance(joined, nn.Linear) and isinstance(inner, nn.Linear) and joined.in_features > inner.out_features:
            found.append((f"single_transformer_blocks.{number}.proj_out", joined.in_features - inner.out_features))
    return found
