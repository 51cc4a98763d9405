"""Which modules of a denoiser a cached unit skips, and which of their outputs it keeps.

A skipped module gives back its kept output where the unit has one for it, else a hollow one: zeros of the right shape
that take no memory, which nobody reads but modules that are skipped too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ..core.cache_plan import BlockRange, DenoiserOutput, ModuleUnit, UnetCut, UnetEncoder, Unit
from ..core.errors import ModelError, UnsupportedError
from ..core.families import find_family
from .block_streams import is_described

# whose forward is the plain one: residual layers and what stands behind each of them in turn, then the sampler
DOWN_BLOCKS = {"DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"}
DOWN_BLOCKS |= {"DownBlockMotion", "CrossAttnDownBlockMotion", "DownBlock3D", "CrossAttnDownBlock3D"}
DOWN_BLOCKS |= {"DownBlockSpatioTemporal", "CrossAttnDownBlockSpatioTemporal"}
UP_BLOCKS = {"UpBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D"}
UP_BLOCKS |= {"UpBlockMotion", "CrossAttnUpBlockMotion", "UpBlock3D", "CrossAttnUpBlock3D"}
UP_BLOCKS |= {"UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"}
SINGLE_LAST = ("transformer_blocks", "single_transformer_blocks")
JOINING = {"Flux2Transformer2DModel"}  # between the two, image and text become one stream: no range reaches across
WHOLE = ""  # as PyTorch names the module itself among its modules
# what runs behind every residual layer, where a block has it, in this order
BEHIND = ("temp_convs", "attentions", "motion_modules", "temp_attentions")


@dataclass(frozen=True)
class Layout:
    """What a unit means in one denoiser."""

    unit: Unit
    skipped: tuple[str, ...]  # dotted names of the modules that a skipped unit does not run, in the order of the run
    kept: frozenset[str]  # those of them whose output is kept; of a block range: the last one


def layout_of(denoiser: nn.Module, unit: Unit) -> Layout:
    """Find the modules of a unit.

    Raises:
        ModelError: the denoiser has no such module.
        UnsupportedError: the denoiser is not built in a way that this kind of unit knows.
    """
    if isinstance(unit, ModuleUnit):
        return Layout(unit, (checked_path(denoiser, unit.path, unit.id),), frozenset({unit.path}))
    if isinstance(unit, DenoiserOutput):
        return Layout(unit, (WHOLE,), frozenset({WHOLE}))
    if isinstance(unit, BlockRange):
        blocks = block_names(denoiser, unit.stacks)
        if unit.end > len(blocks):
            raise ModelError(
                f"cached unit {unit.id!r} ends before block {unit.end}; this {type(denoiser).__name__} has "
                f"{len(blocks)} blocks.",
                mend="Make a plan for this model with dacc search-cache.",
            )
        inside = tuple(blocks[unit.first : unit.end])
        return Layout(unit, inside, frozenset(inside[-1:]))
    if isinstance(unit, UnetCut):
        return _cut(denoiser, unit)
    names = _encoder(denoiser)
    if isinstance(unit, UnetEncoder):
        return Layout(unit, names, frozenset(names))
    names += tuple(f"up_blocks.{number}" for number in range(len(_unet_blocks(denoiser)[1])))
    return Layout(unit, names, frozenset(names[-1:]))


def containers_of(layouts: Iterable[Layout]) -> dict[str, frozenset[str]]:
    """Unit -> the other units whose modules include all of its own.

    Raises:
        UnsupportedError: two units overlap and neither lies in the other, or they are the same.
    """
    layouts = list(layouts)
    found: dict[str, frozenset[str]] = {}
    for inner in layouts:
        found[inner.unit.id] = frozenset(
            outer.unit.id for outer in layouts if outer is not inner and _covers(outer.skipped, inner.skipped)
        )
    for number, first in enumerate(layouts):
        for second in layouts[number + 1 :]:
            nested = (first.unit.id in found[second.unit.id]) != (second.unit.id in found[first.unit.id])
            if not nested and _overlap(first.skipped, second.skipped):
                raise UnsupportedError(
                    f"cached units {first.unit.id!r} and {second.unit.id!r} overlap.",
                    "One may lie in the other, not reach across its border.",
                )
    return found


def block_names(denoiser: nn.Module, stacks: Iterable[str]) -> list[str]:
    """Names of the blocks of several stacks, in the order in which they run."""
    return [f"{stack}.{number}" for stack in stacks for number in range(len(_stack(denoiser, stack)))]


def stacks_of(denoiser: nn.Module) -> tuple[str, ...]:
    """A denoiser's lists of transformer blocks, in the order in which they run: those that its family names, else its
    one list of blocks whose streams are known, or the two of a network that goes on with single blocks; else none.

    Lists that refine image or text alone before the others do not count.
    """
    kind = type(denoiser).__name__
    if known := find_family(kind)[0].stacks:
        return known
    own = ((name, child) for name, child in denoiser.named_children() if isinstance(child, nn.ModuleList))
    found = tuple(
        name for name, blocks in own if "refiner" not in name and len(blocks) and all(map(is_described, blocks))
    )
    if set(found) == set(SINGLE_LAST):
        return SINGLE_LAST[1:] if kind in JOINING else SINGLE_LAST
    return found if len(found) == 1 else ()  # of several the order is not known


def skips_per_group(denoiser: nn.Module) -> list[int]:
    """Skip connections of every down block of a UNet, what enters it included: the layers that a cut can name.

    Raises:
        UnsupportedError: not a UNet of plain blocks.
    """
    down, up = _unet_blocks(denoiser)
    counts = [len(block.resnets) + 1 for block in down]  # type: ignore[arg-type]
    if counts != [len(block.resnets) for block in reversed(up)]:  # type: ignore[arg-type]
        raise _no_unet(denoiser, "its down and up blocks do not mirror each other")
    return counts


def readers_of(denoiser: nn.Module, unit: UnetCut) -> tuple[str, ...]:
    """The convolutions that read first what a skipped cut gives back, beside what is fresh: those of one residual layer
    that stand behind its first norm, and around it all.

    Raises:
        ModelError: the denoiser has no such cut.
        UnsupportedError: not a UNet of plain blocks.
    """
    _cut(denoiser, unit)
    _, up = _unet_blocks(denoiser)
    layer = skips_per_group(denoiser)[unit.block] - 1 - unit.layer
    stem = f"up_blocks.{len(up) - 1 - unit.block}.resnets.{layer}"
    residual = denoiser.get_submodule(stem)
    names = ("conv1", "conv_shortcut")
    return tuple(f"{stem}.{name}" for name in names if isinstance(getattr(residual, name, None), nn.Module))


def _encoder(denoiser: nn.Module) -> tuple[str, ...]:
    down, _ = _unet_blocks(denoiser)
    first = [name for name in ("conv_in", "transformer_in") if getattr(denoiser, name, None) is not None]
    return (*first, *(f"down_blocks.{number}" for number in range(len(down))), *_middle(denoiser))


def _cut(denoiser: nn.Module, unit: UnetCut) -> Layout:
    """Everything behind the skip connection `layer` of group `block`, up to the up layer that reads it."""
    layers = skips_per_group(denoiser)
    if unit.block >= len(layers) or unit.layer >= layers[unit.block]:
        raise ModelError(
            f"cached unit {unit.id!r} cuts at layer {unit.layer} of block {unit.block}; the blocks of this "
            f"{type(denoiser).__name__} have {layers} layers.",
            mend="Make a plan for this model with dacc search-cache.",
        )
    down, up = _unet_blocks(denoiser)
    mirrored = len(up) - 1 - unit.block
    names = _layers_of(down[unit.block], f"down_blocks.{unit.block}", unit.layer, None)
    names += [f"down_blocks.{number}" for number in range(unit.block + 1, len(down))]
    names += _middle(denoiser)
    names += [f"up_blocks.{number}" for number in range(mirrored)]
    names += _layers_of(up[mirrored], f"up_blocks.{mirrored}", 0, layers[unit.block] - 1 - unit.layer)
    if not names:
        raise _no_unet(denoiser, f"nothing lies behind layer {unit.layer} of block {unit.block}")
    return Layout(unit, tuple(names), frozenset(names[-1:]))


def _layers_of(block: nn.Module, name: str, first: int, end: int | None) -> list[str]:
    """Residual layers first ... end - 1 of a block with what runs behind them; up to the sampler with end None."""
    residuals: nn.ModuleList = block.resnets  # type: ignore[assignment]
    behind = [kind for kind in BEHIND if getattr(block, kind, None) is not None]
    found = []
    for number in range(first, len(residuals) if end is None else end):
        found.append(f"{name}.resnets.{number}")
        found += [f"{name}.{kind}.{number}" for kind in behind]
    if end is None:
        found += [f"{name}.downsamplers.{number}" for number in range(len(getattr(block, "downsamplers", None) or ()))]
    return found


def _middle(denoiser: nn.Module) -> list[str]:
    return ["mid_block"] if getattr(denoiser, "mid_block", None) is not None else []


def _unet_blocks(denoiser: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    down, up = getattr(denoiser, "down_blocks", None), getattr(denoiser, "up_blocks", None)
    if not isinstance(down, nn.ModuleList) or not isinstance(up, nn.ModuleList) or len(down) != len(up):
        raise _no_unet(denoiser, "it has no lists of down and up blocks")
    strange = {type(block).__name__ for block in down} - DOWN_BLOCKS
    strange |= {type(block).__name__ for block in up} - UP_BLOCKS
    if strange:
        raise _no_unet(denoiser, f"it has blocks of other kinds ({', '.join(sorted(strange))})")
    return list(down), list(up)


def _no_unet(denoiser: nn.Module, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{type(denoiser).__name__} cannot be cut like a UNet: {why}.", "Cached units of a UNet need its usual blocks."
    )


def _stack(denoiser: nn.Module, name: str) -> nn.ModuleList:
    stack = getattr(denoiser, name, None)
    if not isinstance(stack, nn.ModuleList):
        raise ModelError(
            f"{type(denoiser).__name__} has no list of blocks {name!r}.",
            mend="Make a plan for this model with dacc search-cache.",
        )
    return stack


def checked_path(denoiser: nn.Module, path: str, unit: str) -> str:
    """The name of a module that a unit is or corrects, once it is there.

    Raises:
        ModelError: it is not.
    """
    if path not in dict(denoiser.named_modules()):
        raise ModelError(
            f"cached unit {unit!r} has the module {path!r}, which this {type(denoiser).__name__} does not have.",
            mend="Make a plan for this model with dacc search-cache.",
        )
    return path


def _covers(outer: Iterable[str], inner: Iterable[str]) -> bool:
    return all(any(_within(name, candidate) for candidate in outer) for name in inner)


def _overlap(first: Iterable[str], second: Iterable[str]) -> bool:
    return any(_within(one, other) or _within(other, one) for one in first for other in second)


def _within(name: str, outer: str) -> bool:
    return outer in (name, WHOLE) or name.startswith(f"{outer}.")
