"""Layers that read two tensors joined along their channels: their inputs have two very different ranges.

In a UNet the skip convolution of an up block reads the deep features beside those that the way down left (Q-Diffusion:
Li et al., 2023, arXiv 2302.04304, section 4.3); in Flux the last linear of a single block reads attention beside the
feed-forward product.
"""

from __future__ import annotations

from itertools import chain

from torch import nn


def find_splits(model: nn.Module) -> dict[str, int]:
    """Layer name -> input channels of the first of the two tensors."""
    return dict(chain(_shortcuts(model), _joined_streams(model)))


def _shortcuts(model: nn.Module) -> list[tuple[str, int]]:
    """Skip convolutions of the up blocks: before them come the features of the residual block that ran last."""
    found: list[tuple[str, int]] = []
    deep = _last_width(getattr(model, "mid_block", None)) or _last_width(list(getattr(model, "down_blocks", []))[-1:])
    for number, block in enumerate(getattr(model, "up_blocks", [])):
        for index, resnet in enumerate(getattr(block, "resnets", [])):
            shortcut = getattr(resnet, "conv_shortcut", None)
            if isinstance(shortcut, nn.Conv2d) and deep and 0 < deep < shortcut.in_channels:
                found.append((f"up_blocks.{number}.resnets.{index}.conv_shortcut", deep))
            deep = resnet.out_channels
    return found


def _last_width(parts: object) -> int | None:
    """Channels that the last residual block of a stage gives."""
    stages = parts if isinstance(parts, list) else [parts]
    resnets = [resnet for stage in stages for resnet in getattr(stage, "resnets", [])]
    return int(resnets[-1].out_channels) if resnets else None


def _joined_streams(model: nn.Module) -> list[tuple[str, int]]:
    found = []
    for number, block in enumerate(getattr(model, "single_transformer_blocks", [])):
        joined, inner = getattr(block, "proj_out", None), getattr(block, "proj_mlp", None)
        if isinstance(joined, nn.Linear) and isinstance(inner, nn.Linear) and joined.in_features > inner.out_features:
            found.append((f"single_transformer_blocks.{number}.proj_out", joined.in_features - inner.out_features))
    return found
