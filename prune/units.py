"""What can be removed from a denoiser as a whole, and what must not.

A unit of a transformer is a block (two where a skip connection joins them); of a U-Net a layer of a down stage with its
mirror of the up stage, or the middle block; with `kind="depth"` one transformer block of an attention that has several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..core.errors import UnsupportedError
from .stacks import TRANSFORMERS, UNETS, Stack, UnetKind
from .unet import Modules, mirror

if TYPE_CHECKING:
    from torch import nn

Kind = Literal["auto", "layer", "depth"]
PROTECTED_AT_MOST = 2  # blocks at each end of a list of transformer blocks
PROTECTED_SHARE = 8  # and no more than one in so many


@dataclass(frozen=True)
class Unit:
    """One thing that stays or goes.

    Args:
        name: for people and manifests.
        modules: everything that goes with it, names in the denoiser.
        sites: what stands at each place from which something goes: the first and the last module, in the order in which
            they run. What enters the first and what leaves the last are of one shape.
        stack: units of one stack follow each other, by `position`.
        parameters: of all its modules.
    """

    name: str
    modules: tuple[str, ...]
    sites: tuple[tuple[str, str], ...]
    stack: str
    position: int
    parameters: int


def find_units(denoiser: nn.Module, *, strict: bool = False, kind: Kind = "auto") -> list[Unit]:
    """The units of a denoiser that may be removed, in the order of its config. The denoiser may be on the meta device.

    Args:
        strict: only what its config can express, in any combination.
        kind: of U-Nets: layers with their mirrors and the middle ("auto", "layer"), or single transformer blocks.

    Raises:
        UnsupportedError: nothing is known to be removable.
    """
    name = type(denoiser).__name__
    sizes = sizes_of(denoiser)
    if name in TRANSFORMERS and kind == "auto":
        units = [unit for stack in TRANSFORMERS[name] for unit in _blocks(denoiser, stack)]
    elif name in UNETS and kind != "depth":
        units = _layers(UNETS[name], Modules(sizes), strict=strict)
    elif name in UNETS and UNETS[name].depth:
        units = _depths(Modules(sizes))
    else:
        known = name in TRANSFORMERS or name in UNETS
        raise UnsupportedError(
            f"a {name} has no units of kind {kind!r}." if known else f"no removable parts of a {name} are known.",
            mend="Leave --set units out." if known else f"Known: {', '.join(sorted([*TRANSFORMERS, *UNETS]))}.",
        )
    if not units:
        raise UnsupportedError(
            f"this {name} has no part that could be removed" + (" by its config alone." if strict else "."),
            mend="Leave --strict-config out." if strict else "",
        )
    return [_with_size(unit, sizes) for unit in units]


def sizes_of(denoiser: nn.Module) -> dict[str, int]:
    """Parameters of every module."""
    return {name: sum(value.numel() for value in part.parameters()) for name, part in denoiser.named_modules()}


def unit_of(modules: Sequence[str], sites: Sequence[tuple[str, str]], *, name: str, stack: str, position: int) -> Unit:
    """A unit whose parameters are not counted yet."""
    return Unit(name, tuple(modules), tuple(sites), stack, position, 0)


def _with_size(unit: Unit, sizes: dict[str, int]) -> Unit:
    total = sum(sizes[name] for name in unit.modules)
    return Unit(unit.name, unit.modules, unit.sites, unit.stack, unit.position, total)


def _blocks(denoiser: nn.Module, stack: Stack) -> list[Unit]:
    blocks: Any = denoiser.get_submodule(stack.path)
    count = len(blocks)
    protected = min(PROTECTED_AT_MOST, count // PROTECTED_SHARE)
    first = max(protected, 1 if stack.first else 0)
    last = max(protected, 1 if stack.last else 0)
    if stack.mirrored:
        return [_pair(stack, place, count) for place in range(first, count // 2 - 1)]
    names = [(place, f"{stack.path}.{place}") for place in range(first, count - last)]
    return [unit_of([name], [(name, name)], name=name, stack=stack.path, position=place) for place, name in names]


def _pair(stack: Stack, place: int, count: int) -> Unit:
    names = [f"{stack.path}.{place}", f"{stack.path}.{count - 1 - place}"]
    sites = [(name, name) for name in names]
    return unit_of(names, sites, name=" + ".join(names), stack=stack.path, position=place)


def _layers(kind: UnetKind, modules: Modules, *, strict: bool) -> list[Unit]:
    """Pairs of every stage, from the shallowest on, and the middle."""
    stages = modules.size("down_blocks")
    found = []
    for number in range(stages):
        down, up = f"down_blocks.{number}", f"up_blocks.{stages - 1 - number}"
        layers = modules.size(f"{down}.resnets")
        for place in range(1, layers):
            there, back = (
                [f"{path}.{at}" for path in modules.lists(block)]
                for block, at in ((down, place), (up, mirror(layers, place)))
            )
            sites = [(there[0], there[-1]), (back[0], back[-1])]
            name = f"{down}.{place} + {up}.{mirror(layers, place)}"
            found.append(unit_of([*there, *back], sites, name=name, stack=down, position=place))
    if strict and not kind.per_stage:
        found = _in_every_stage(found, stages)
    if "mid_block" in modules and not (strict and kind.middle is None):
        found.append(unit_of(["mid_block"], [("mid_block", "mid_block")], name="mid_block", stack="mid", position=0))
    return found


def _in_every_stage(pairs: list[Unit], stages: int) -> list[Unit]:
    """Where one number counts the layers of all stages, a layer goes from all of them."""
    found = []
    for place in sorted({unit.position for unit in pairs}):
        together = [unit for unit in pairs if unit.position == place]
        if len(together) == stages:
            modules = [name for unit in together for name in unit.modules]
            sites = [site for unit in together for site in unit.sites]
            name = f"layer {place} of every stage"
            found.append(unit_of(modules, sites, name=name, stack="stages", position=place))
    return found


def _depths(modules: Modules) -> list[Unit]:
    """Transformer blocks of attentions that have several. The middle is as deep as the first attention of the last
    stage, so that their blocks go together."""
    stages = modules.size("down_blocks")
    blocks = [f"down_blocks.{place}" for place in range(stages)] + [f"up_blocks.{place}" for place in range(stages)]
    tied = f"down_blocks.{stages - 1}.attentions.0"
    found = []
    for block in blocks:
        for place in range(modules.size(f"{block}.attentions")):
            attention = f"{block}.attentions.{place}"
            path = f"{attention}.transformer_blocks"
            depth = modules.size(path)
            for index in range(1, depth):  # one has to stay
                names = [f"{path}.{index}"]
                if attention == tied and modules.size("mid_block.attentions.0.transformer_blocks"):
                    names.append(f"mid_block.attentions.0.transformer_blocks.{index}")
                sites = [(name, name) for name in names]
                found.append(unit_of(names, sites, name=" + ".join(names), stack=path, position=index))
    return found
