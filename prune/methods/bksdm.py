"""Fixed patterns, which need no look at the network, after BK-SDM: A Lightweight, Fast, and Cheap Version of Stable
Diffusion (Kim et al., 2023), arXiv 2305.15798. Of a U-Net

- `base`: of every stage only the first layer going down stays, and the first and the last going up; attentions of
  several transformer blocks keep theirs;
- `small`: the middle block goes too;
- `tiny`: so does the innermost stage, with the down-sampling that leads to it. Only where the stage before is as wide.

Of a transformer blocks go at even distances, as in the baseline of that name in TinyFusion (Fang et al., 2024), arXiv
2412.01199: the paper itself is about U-Nets. Where it has several lists of blocks, each gives its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING, Literal

from ...core.errors import ConfigError, UnsupportedError
from ..config import KEPT_PROMISE
from ..request import Request
from ..select import largest
from ..settings import MethodConfig
from ..stacks import UNETS

if TYPE_CHECKING:
    from ..units import Unit

SIZES = ("base", "small", "tiny")


class BkSdmConfig(MethodConfig):
    """Fields of `--set`."""

    size: Literal["auto", "base", "small", "tiny"] = "auto"  # of U-Nets; auto: the first that reaches the ratio


CONFIG = BkSdmConfig
NEEDS = ()


def select(request: Request, config: BkSdmConfig) -> tuple[str, ...]:
    """The modules to remove.

    Raises:
        UnsupportedError: no pattern reaches the ratio, or the network has nothing that this one removes.
        ConfigError: a size is asked for that only a U-Net has, or a ratio beside it.
    """
    if request.class_name not in UNETS:
        if config.size != "auto":
            raise ConfigError(f"--set size is for U-Nets, not for a {request.class_name}.", mend="Give --ratio.")
        return _evenly(request)
    if config.size != "auto":
        if request.ratio is not None:
            raise ConfigError("--set size says how much goes, and so does --ratio.", mend="Give one of them.")
        return pattern(request, config.size)
    found = [names for size in SIZES if (names := _pattern_or_none(request, size))]
    if request.ratio is None:
        return found[0]
    for names in found:
        if size_of(request, names) >= KEPT_PROMISE * request.ratio * request.total:
            return names
    raise request.out_of_reach(size_of(request, found[-1]), takes_neighbours=True)


def pattern(request: Request, size: str) -> tuple[str, ...]:
    """What goes from a U-Net.

    Raises:
        UnsupportedError: there is no second layer or no middle to remove, or the innermost stage has to stay.
    """
    stages = request.modules.size("down_blocks")
    names = [name for unit in request.units if unit.stack != "mid" for name in unit.modules]
    middle = [name for unit in request.units if unit.stack == "mid" for name in unit.modules]
    if size == "base" and not names:
        raise UnsupportedError(
            f"every stage of this {request.class_name} has one layer alone: --set size=base would remove nothing.",
            mend="Use --set size=small, which removes the middle.",
        )
    if size == "small" and not middle:
        raise UnsupportedError(
            f"this {request.class_name} has no middle block that can go"
            + (" by its config alone." if request.strict else "."),
            "--set size=small would remove what size=base does.",
            "Use --set size=base" + (", or leave --strict-config out." if request.strict else "."),
        )
    if size != "base":
        names += middle
    if size != "tiny":
        return tuple(names)
    widths, kind = list(request.config["block_out_channels"]), UNETS[request.class_name]
    if stages < 2 or not kind.can_drop_stage or widths[-1] != widths[-2]:
        raise UnsupportedError(
            f"the innermost stage of this {request.class_name} has to stay.",
            "It can go where the stage before it has as many channels.",
            f"Use --set size={'small' if middle else 'base'}.",
        )
    inner, outer = f"down_blocks.{stages - 1}", "up_blocks.0"
    kept = [name for name in names if not name.startswith((f"{inner}.", f"{outer}."))]
    return (*kept, inner, outer, f"down_blocks.{stages - 2}.downsamplers")


def size_of(request: Request, names: tuple[str, ...]) -> int:
    """Parameters of modules, none of which lies in another."""
    return sum(request.sizes[name] for name in names)


def _pattern_or_none(request: Request, size: str) -> tuple[str, ...]:
    try:
        return pattern(request, size)
    except UnsupportedError:
        return ()


def _evenly(request: Request) -> tuple[str, ...]:
    """As many units as the ratio needs, of each stack its share, at even distances."""
    if request.ratio is None:
        raise ConfigError(
            f"of a {request.class_name} blocks go at even distances, and nothing says how many.", mend="Give --ratio."
        )
    needed = request.needed()
    stacks: dict[str, list[Unit]] = {}
    for unit in request.units:
        stacks.setdefault(unit.stack, []).append(unit)
    share = needed / sum(request.costs[unit.name] for unit in request.units)
    going: dict[str, list[Unit]] = {stack: [] for stack in stacks}
    while sum(request.costs[unit.name] for units in going.values() for unit in units) < needed:
        more = {
            stack: found
            for stack, units in stacks.items()
            if (found := _even_places(units, len(going[stack]) + 1, request.allow_adjacent)) is not None
        }
        if not more:
            items = request.items(dict.fromkeys(request.costs, 0.0))
            raise request.out_of_reach(largest(items, request.rules()))
        behind = max(more, key=lambda stack: share * len(stacks[stack]) - len(going[stack]))
        going[behind] = more[behind]
    return tuple(name for units in going.values() for unit in units for name in unit.modules)


def _even_places(units: Sequence[Unit], count: int, allow_adjacent: bool) -> list[Unit] | None:
    """So many units of a stack, each as near as can be to the middle of one of so many equal parts; None where they
    do not fit."""
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())] * (len(units) + 1)  # of the first so many units
    for part in range(count):
        mark = (part + 0.5) * len(units) / count - 0.5
        now: list[tuple[float, tuple[int, ...]]] = [(inf, ())]
        for place, unit in enumerate(units):
            beside = place > 0 and units[place - 1].position == unit.position - 1
            error, others = best[place - 1 if beside and not allow_adjacent else place]
            now.append(min(now[-1], (error + (place - mark) ** 2, (*others, place))))
        best = now
    error, places = best[-1]
    return [units[place] for place in places] if error < inf else None
