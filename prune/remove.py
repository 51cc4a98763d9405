"""What a config, and the names of a denoiser, become when blocks are removed.

Transformers lose entries of their lists. A U-Net loses pairs: layer j of a down stage with that layer of the up stage
across from it which reads the skip connection of layer j - 1, so that what is left fits without a gap: all skip
connections of a stage are alike but the first. The layers that change the number of channels stay.

Where the class of a model cannot be built without a module, the module stays in its place and passes on what enters it:
it is named among the identity modules.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..core.block_names import Keep, new_name
from ..core.errors import ConfigError, UnsupportedError
from .stacks import TRANSFORMERS, UNETS, Stack
from .unet import unet_removal


@dataclass(frozen=True)
class Removal:
    """A denoiser without some of its modules."""

    config: dict[str, Any]  # fields of config.json, without those of quantization
    removed: frozenset[str]  # modules of the source
    keep: dict[str, tuple[int, ...]]  # lists that are numbered anew
    identity: tuple[str, ...]  # modules of the result that pass on what enters them
    copies: dict[str, str]  # module of the result -> module of the source that is put there


def plan_removal(
    class_name: str, config: Mapping[str, Any], modules: Collection[str], removed: Collection[str]
) -> Removal:
    """The denoiser without `removed`.

    Args:
        config: every field of its config, defaults included.
        modules: names of all its modules.
        removed: names of those that go.

    Raises:
        ConfigError: a name is none of the denoiser's.
        UnsupportedError: the class is not known, or something would be left that cannot run.
    """
    if strange := sorted(set(removed) - set(modules)):
        raise ConfigError(f"{class_name} has no module {strange[0]!r}.", mend="dacc inspect shows its blocks.")
    gone = frozenset(name for name in removed if not _inside(name, removed))
    plain = {key: value for key, value in config.items() if not key.startswith("_") and key != "quantization_config"}
    copies: dict[str, str] = {}
    identity: frozenset[str] = frozenset()
    if class_name in TRANSFORMERS:
        after, keep = _transformer(TRANSFORMERS[class_name], plain, gone)
        copies = _copies(TRANSFORMERS[class_name], keep)
    elif class_name in UNETS:
        after, keep, identity = unet_removal(UNETS[class_name], plain, modules, gone)
    else:
        raise UnsupportedError(
            f"it is not known which blocks of a {class_name} could be removed.",
            mend=f"Known: {', '.join(sorted([*TRANSFORMERS, *UNETS]))}.",
        )
    names = sorted(new for name in identity if (new := new_name(name, keep, ())) is not None)
    return Removal(after, gone, keep, tuple(names), copies)


def _transformer(
    stacks: tuple[Stack, ...], config: dict[str, Any], gone: frozenset[str]
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Config and lists of a transformer whose stacks lose blocks."""
    after, keep, left = dict(config), dict[str, tuple[int, ...]](), set(gone)
    for stack in stacks:
        count = config[stack.count]
        lost = {place for place in range(count) if f"{stack.path}.{place}" in gone}
        left -= {f"{stack.path}.{place}" for place in lost}
        if not lost:
            continue
        _check_stack(stack, count, lost)
        kept = tuple(place for place in range(count) if place not in lost)
        keep[stack.path], after[stack.count] = kept, len(kept)
        if stack.places:
            after[stack.places] = [kept.index(place) for place in config[stack.places] if place in kept]
    if left:
        raise UnsupportedError(
            f"{sorted(left)[0]} is no whole block of {' or '.join(stack.path for stack in stacks)}.",
            "Only whole blocks of a transformer can be removed.",
        )
    return after, keep


def _check_stack(stack: Stack, count: int, lost: set[int]) -> None:
    if stack.last and count - 1 in lost:
        raise UnsupportedError(f"the last of {stack.path} is built in another way than the others: it has to stay.")
    wrong = [place for place in sorted(lost) if stack.mirrored and not _paired(place, count, lost)]
    if wrong:
        raise UnsupportedError(
            f"{stack.path}.{wrong[0]} cannot go alone: blocks i and {count - 1} - i are joined by a skip connection, "
            "and the two in the middle by none.",
            mend="Remove both or none.",
        )


def _paired(place: int, count: int, lost: set[int]) -> bool:
    return count - 1 - place in lost and min(place, count - 1 - place) < count // 2 - 1


def _copies(stacks: tuple[Stack, ...], keep: Keep) -> dict[str, str]:
    """The network reads the embedding of time in the first block: the new first one gets that of the old."""
    found = {}
    for stack in stacks:
        if stack.first and keep.get(stack.path, (0,))[0] != 0:
            found[f"{stack.path}.0.{stack.first}"] = f"{stack.path}.0.{stack.first}"
    return found


def _inside(name: str, others: Collection[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:length]) in others for length in range(1, len(parts)))
