"""Tensors and modules of a denoiser that lost blocks, and where they come from in its source."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..core.block_names import Keep, new_name


def sources_of(
    names: Collection[str], keep: Keep, removed: Collection[str], copies: Mapping[str, str]
) -> dict[str, str]:
    """Tensor of the result -> the tensor of the source that it is.

    Args:
        names: tensors of the source.
        copies: module of the result -> module of the source that is put there in place of its own.
    """
    found = {new: name for name in names if (new := new_name(name, keep, removed)) is not None}
    for target, origin in copies.items():
        mine = [new for new in found if new.startswith(f"{target}.")]
        found |= {new: origin + new.removeprefix(target) for new in mine}
    return found


def index_map(modules: Collection[str], keep: Keep, removed: Collection[str]) -> dict[str, str]:
    """Module of the source -> its new name, where that is another one. Adapters made for the source need it.

    Only the outermost modules that moved are named: what lies in them moved with them.
    """
    moved: dict[str, str] = {}
    for name in sorted(modules, key=lambda text: text.count(".")):
        new = new_name(name, keep, removed)
        if new is None or new == name:
            continue
        parent = max((old for old in moved if name.startswith(f"{old}.")), key=len, default=None)
        if parent is None or moved[parent] + name.removeprefix(parent) != new:
            moved[name] = new
    return dict(sorted(moved.items()))
