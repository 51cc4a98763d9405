"""A U-Net without some layers: which fields of its config say so, and which modules have to stay as identities.

Letters: n stages; stage i is down block i with up block n - 1 - i. A down stage of L layers has an up stage of L + 1,
whose layer k reads the skip connection of down layer L - 1 - k; the last one reads what entered the stage.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..core.errors import UnsupportedError
from .stacks import LAYER_LISTS, UnetKind

DEPTHS = "transformer_layers_per_block"
REVERSED_DEPTHS = "reverse_transformer_layers_per_block"
FROM_THE_OUTERMOST = ("down_block_types", "block_out_channels", "layers_per_block", "only_cross_attention",
                      "cross_attention_dim", "attention_head_dim", "num_attention_heads", DEPTHS)  # fmt: skip
FROM_THE_INNERMOST = ("up_block_types", REVERSED_DEPTHS)


class Modules:
    """The lists of a denoiser, from the names of its modules."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = set(names)
        self._sizes: dict[str, int] = {}
        for name in self._names:
            path, _, place = name.rpartition(".")
            if place.isdecimal():
                self._sizes[path] = max(self._sizes.get(path, 0), int(place) + 1)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def size(self, path: str) -> int:
        """Entries of a list; 0 where there is none."""
        return self._sizes.get(path, 0)

    def lists(self, block: str) -> list[str]:
        """The lists of a stage that have an entry for each layer."""
        return [path for name in LAYER_LISTS if self.size(path := f"{block}.{name}")]


@dataclass(frozen=True)
class _Stage:
    """One resolution."""

    down: str
    up: str
    layers: int  # of the down stage
    kept: tuple[int, ...]  # of the down stage
    kept_up: tuple[int, ...]


def unet_removal(
    kind: UnetKind, config: Mapping[str, Any], names: Collection[str], gone: frozenset[str]
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], frozenset[str]]:
    """Config of a U-Net without `gone`, the lists that are numbered anew, and the modules that stay as identities.

    Raises:
        UnsupportedError: what is left could not run.
    """
    after, keep, identity, modules = dict(config), dict[str, tuple[int, ...]](), set[str](), Modules(names)
    left = set(gone)
    stages = _stages(modules, gone)
    if f"down_blocks.{len(stages) - 1}" in gone:
        left -= _drop_stage(kind, after, keep, len(stages), modules, gone)
        stages = stages[:-1]
    if "mid_block" in left:
        left.discard("mid_block")
        if kind.middle is None:
            identity.add("mid_block")
        else:
            after[kind.middle] = None
    counts = [len(stage.kept) for stage in stages]
    told = kind.per_stage or len(set(counts)) == 1
    for stage in stages:
        if len(stage.kept) == stage.layers:
            continue
        lost = _lists(modules, stage, gone)
        left -= lost
        if told:
            keep |= dict.fromkeys(modules.lists(stage.down), stage.kept)
            keep |= dict.fromkeys(modules.lists(stage.up), stage.kept_up)
        else:
            identity |= lost
    if told and counts != [stage.layers for stage in stages]:
        after["layers_per_block"] = counts[0] if len(set(counts)) == 1 else counts
    if kind.depth:
        left -= _shorten(after, keep, modules, stages, gone, identity)
    if left:
        raise UnsupportedError(
            f"{sorted(left)[0]} is no part of a U-Net that can be removed alone.",
            "Whole layers go in pairs, one of a down and one of an up stage.",
        )
    return after, keep, frozenset(identity)


def mirror(layers: int, place: int) -> int:
    """The layer of the up stage that goes with layer `place` (1 to L - 1) of the down stage."""
    return layers - place


def _stages(modules: Modules, gone: frozenset[str]) -> list[_Stage]:
    count, found = modules.size("down_blocks"), []
    for number in range(count):
        down, up = f"down_blocks.{number}", f"up_blocks.{count - 1 - number}"
        layers = modules.size(f"{down}.resnets")
        kept = tuple(place for place in range(layers) if f"{down}.resnets.{place}" not in gone)
        kept_up = tuple(place for place in range(layers + 1) if f"{up}.resnets.{place}" not in gone)
        if len(kept_up) != len(kept) + 1 or {0, layers} - {*kept_up} or 0 not in kept:
            raise UnsupportedError(
                f"stage {number} would keep the layers {list(kept)} going down and {list(kept_up)} going up.",
                "The first layers of both, and the last one going up, change the number of channels, and each layer "
                "going down needs one going up.",
            )
        found.append(_Stage(down, up, layers, kept, kept_up))
    return found


def _lists(modules: Modules, stage: _Stage, gone: frozenset[str]) -> set[str]:
    """The modules of the layers that a stage loses.

    Raises:
        UnsupportedError: a part of such a layer would stay.
    """
    lost = {
        f"{path}.{place}"
        for block, kept, count in ((stage.down, stage.kept, stage.layers), (stage.up, stage.kept_up, stage.layers + 1))
        for path in modules.lists(block)
        for place in range(count)
        if place not in kept
    }
    if missing := sorted(lost - gone):
        raise UnsupportedError(f"{missing[0]} would stay without the residual layer that it belongs to.")
    return lost


def _drop_stage(
    kind: UnetKind, config: dict[str, Any], keep: dict[str, Any], count: int, modules: Modules, gone: frozenset[str]
) -> set[str]:
    """Change the config so that the innermost stage is not built; what goes with it."""
    parts = {f"down_blocks.{count - 1}", f"down_blocks.{count - 2}.downsamplers", "up_blocks.0"}
    parts |= {"mid_block"} if "mid_block" in modules else set()
    widths = list(config["block_out_channels"])
    if not kind.can_drop_stage or count < 2 or widths[-1] != widths[-2]:
        raise UnsupportedError(
            f"the innermost stage has to stay: it and the one before it have {widths[-2:]} channels.",
            "It can go where these are equal, in classes that can do without a middle block.",
        )
    if missing := sorted(parts - gone):
        raise UnsupportedError(f"{missing[0]} belongs to the innermost stage and would stay.")
    for field in (*FROM_THE_OUTERMOST, *FROM_THE_INNERMOST):
        if isinstance(value := config.get(field), list | tuple):
            config[field] = list(value[1:] if field in FROM_THE_INNERMOST else value[:-1])
    assert kind.middle is not None
    config[kind.middle] = None
    keep["up_blocks"] = tuple(range(1, count))
    return parts


def _shorten(
    config: dict[str, Any],
    keep: dict[str, Any],
    modules: Modules,
    stages: list[_Stage],
    gone: frozenset[str],
    identity: Collection[str],
) -> set[str]:
    """Change the config to the number of transformer blocks that each attention keeps; those that are removed."""
    lost: set[str] = set()

    def depth(attention: str) -> int:
        path = f"{attention}.transformer_blocks"
        kept = tuple(place for place in range(modules.size(path)) if f"{path}.{place}" not in gone)
        if len(kept) < modules.size(path):
            if not kept:
                raise UnsupportedError(f"{attention} would keep none of its transformer blocks.")
            keep[path] = kept
            lost.update(f"{path}.{place}" for place in range(modules.size(path)) if place not in kept)
        return len(kept)

    def depths(block: str, kept: tuple[int, ...]) -> list[int]:
        paths = [f"{block}.attentions.{place}" for place in kept if f"{block}.attentions.{place}" not in identity]
        return [depth(path) for path in paths if modules.size(f"{path}.transformer_blocks")]

    down = [depths(stage.down, stage.kept) for stage in stages]
    up = [depths(stage.up, stage.kept_up) for stage in stages]
    middle = depth("mid_block.attentions.0") if "mid_block" not in gone else 0
    told = (entry for field in (DEPTHS, REVERSED_DEPTHS) for entry in _listed(config.get(field), len(stages)))
    if not lost and not any(isinstance(entry, list | tuple) for entry in told):
        return lost
    flat = [_flat(found, before) for found, before in zip(down, _listed(config[DEPTHS], len(stages)), strict=True)]
    first = flat[-1][0] if isinstance(flat[-1], list) else flat[-1]
    if middle and middle != first:
        raise UnsupportedError(
            f"the middle would keep {middle} transformer blocks and the first attention of the last stage {first}.",
            "The config has one number for both.",
        )
    even = all(set(above) <= {entry} for above, entry in zip(up, flat, strict=True) if not isinstance(entry, list))
    config[DEPTHS] = flat
    config[REVERSED_DEPTHS] = None
    if not even or any(isinstance(entry, list) for entry in flat):
        config[REVERSED_DEPTHS] = [
            _flat(above, below) for above, below in zip(reversed(up), reversed(flat), strict=True)
        ]
    return lost


def _listed(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * count


def _flat(found: list[int], before: Any) -> Any:
    """One number where all attentions of a stage are alike, or it has none."""
    if not found:
        return before
    return found[0] if len(set(found)) == 1 else found
