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
