"""Names of a denoiser before and after blocks are removed: lists are numbered anew, all other names stay."""

from __future__ import annotations

from collections.abc import Collection, Mapping

Keep = Mapping[str, tuple[int, ...]]  # list of blocks -> places of those that stay, ascending


def new_name(name: str, keep: Keep, removed: Collection[str]) -> str | None:
    """Where a module or tensor of the source is found afterwards; None for what is removed.

    Args:
        name: dotted, in the source.
        removed: modules of the source; what lies in them goes with them.
    """
    old: list[str] = []
    new: list[str] = []
    for part in name.split("."):
        kept = keep.get(".".join(old)) if part.isdecimal() else None
        if kept is not None:
            if int(part) not in kept:
                return None
            new.append(str(kept.index(int(part))))
        else:
            new.append(part)
        old.append(part)
        if ".".join(old) in removed:
            return None
    return ".".join(new)


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
