"""Pairs of modules, one of what is left and one of the whole network, that should give the same after training."""

from __future__ import annotations

from collections.abc import Collection

from ..core.block_names import new_name
from .remove import Removal
from .stacks import TRANSFORMERS
from .unet import Modules


def taps_of(class_name: str, names: Collection[str], removal: Removal) -> list[tuple[str, str]]:
    """(module of what is left, module of the source), in the order in which they run.

    Of a U-Net every stage, as in BK-SDM (arXiv 2305.15798). Of a transformer every block that is left, paired with the
    last block of the source before the next one that is left: that next block was trained to read what it gives.

    Args:
        names: modules of the source.
    """
    modules = Modules(names)
    if class_name in TRANSFORMERS:
        found = []
        for stack in TRANSFORMERS[class_name]:
            count = modules.size(stack.path)
            kept = removal.keep.get(stack.path, tuple(range(count)))
            ends = [*(place - 1 for place in kept[1:]), count - 1] if kept else []
            found += [(f"{stack.path}.{new}", f"{stack.path}.{old}") for new, old in enumerate(ends)]
        return found
    count = modules.size("down_blocks")
    blocks = [f"{side}_blocks.{place}" for side in ("down", "up") for place in range(count)]
    pairs = [(new_name(block, removal.keep, removal.removed), block) for block in blocks]
    return [(new, old) for new, old in pairs if new is not None and not _resized(old, removal)]


def _resized(block: str, removal: Removal) -> bool:
    """Whether a stage no longer ends with the sampler that it had."""
    return f"{block}.downsamplers" in removal.removed
