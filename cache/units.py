"""Which part of a denoiser a search caches when nobody says so."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType

from torch import nn

from ..core.cache_plan import ModuleUnit, Unit, UnitMacs
from ..core.config import nearest
from ..core.errors import ConfigError, DaccError, UnsupportedError
from ..runtime.cache_units import block_names, containers_of, layout_of, stacks_of
from ..runtime.quantized_layer import QuantizedLayer
from .config import UNIT_FORMS, parse_unit

# of a transformer block, in the order in which they run; what they give is scaled and added by the block itself
PARTS = ("attn1", "attn2", "attn", "ff", "ffn", "ff_context", "proj_mlp", "proj_out")
_ALONE = re.compile(r"\.attentions\.\d+$")  # an attention of a UNet without a transformer block around it


def choose_unit(denoiser: nn.Module, text: str) -> Unit:
    """The unit that a search is to treat.

    "auto" cuts a UNet at its shallowest skip connection, so that its first convolution and last layer stay fresh, and
    takes all blocks of a transformer but the first and the last. The "body" of a transformer is all of its blocks.

    Raises:
        ConfigError: the denoiser has no such part.
        UnsupportedError: no part of this denoiser is known that could be cached.
    """
    stacks, unet = stacks_of(denoiser), _is_unet(denoiser)
    if text == "body" and stacks and not unet:
        return parse_unit(f"blocks:0-{len(block_names(denoiser, stacks))}", stacks)
    if text.startswith("blocks:") and not stacks:
        raise UnsupportedError(
            f"it is not known which lists of blocks a {type(denoiser).__name__} runs in which order.",
            mend="Name a part with --unit module:NAME.",
        )
    if text != "auto":
        unit = parse_unit(text, stacks)
        _check(denoiser, unit, text)
        return unit
    if unet:
        unit = parse_unit("cut:0.0", stacks)
        layout_of(denoiser, unit)  # refuses a UNet of unusual blocks
        return unit
    if not stacks or len(block_names(denoiser, stacks)) < 2:
        raise UnsupportedError(
            f"it is not known which blocks of a {type(denoiser).__name__} could be cached.",
            mend="Name a part with --unit module:NAME; dacc inspect shows them.",
        )
    count = len(block_names(denoiser, stacks))
    return parse_unit(f"blocks:1-{count - 1 if count > 2 else count}", stacks)


def choose_units(denoiser: nn.Module, text: str) -> tuple[Unit, ...]:
    """The units of a search over many; several texts have commas between.

    "auto" takes the attentions and feed-forward layers of every transformer block, and the shallowest cut of a UNet.

    Raises:
        ConfigError: the denoiser has no such part, or two of them overlap.
        UnsupportedError: it is not known which parts of this denoiser could be cached.
    """
    if text != "auto":
        parts = text.split(",")
        units = tuple(choose_unit(denoiser, part) for part in parts)
        units = tuple(unit.model_copy(update={"id": part}) for unit, part in zip(units, parts, strict=True))
    else:
        units = _parts(denoiser)
    containers_of([layout_of(denoiser, unit) for unit in units])  # refuses what overlaps
    return units


def check_saving(units: Sequence[Unit], macs: UnitMacs) -> None:
    """Refuse what a call that skips it is not cheaper by.

    Raises:
        ConfigError: a unit that is never called, or that multiplies nothing.
    """
    for unit in units:
        if macs.units[unit.id] <= 0:
            raise ConfigError(
                f"--unit: a call that skips {unit.id} saves no multiply-accumulates.",
                "The denoiser never calls it, as a list of blocks, whose blocks it calls one by one; or nothing is "
                "multiplied in it.",
                "Name what it calls, such as one block, with --unit module:NAME, or a range, blocks:FIRST-END.",
            )


def _parts(denoiser: nn.Module) -> tuple[Unit, ...]:
    stacks = stacks_of(denoiser)
    unet = _is_unet(denoiser)
    cut = (choose_unit(denoiser, "auto"),) if unet else ()
    blocks = block_names(denoiser, stacks) if stacks else []
    modules = dict(denoiser.named_modules())
    if unet:
        blocks = [name for name, module in modules.items() if type(module).__name__ == "BasicTransformerBlock"]
    names = [f"{block}.{part}" for block in blocks for part in PARTS if modules.get(f"{block}.{part}") is not None]
    names += [name for name, module in modules.items() if unet and _ALONE.search(name) and hasattr(module, "to_q")]
    if not names and not cut:
        raise UnsupportedError(
            f"it is not known which blocks of a {type(denoiser).__name__} could be cached.",
            mend="Name parts with --unit module:NAME,module:NAME; dacc inspect shows them.",
        )
    return (*cut, *(ModuleUnit(id=name, path=name) for name in names))


def unit_text(asked: str, name: str, method: ModuleType, denoiser: nn.Module) -> str:
    """What a search treats: what was asked for, where that is auto what the method is best at in such a denoiser, if it
    knows; a method that is about one part of a network decides by itself.

    Raises:
        ConfigError: another part was asked for than the method treats.
    """
    if "," in asked:
        raise ConfigError(f"--method {name} treats one unit, not {asked}.", mend="Name one, or use --method evolve.")
    own: str = getattr(method, "UNIT", asked)
    if asked not in ("auto", own):
        raise ConfigError(
            f"--method {name} treats --unit {own}, not {asked}.",
            mend="Leave --unit out, or choose another method.",
        )
    if own == "auto" and hasattr(method, "best_units"):
        return next(text for text in method.best_units(_fewest_bits(denoiser)) if _has(denoiser, text))
    return own


def _fewest_bits(denoiser: nn.Module) -> int:
    """Of a weight; 16 where none is quantized."""
    layers = (module for module in denoiser.modules() if isinstance(module, QuantizedLayer))
    return min((layer.scheme.bits for layer in layers), default=16)


def _has(denoiser: nn.Module, text: str) -> bool:
    with suppress(DaccError):
        return bool(choose_unit(denoiser, text))
    return False


def _is_unet(denoiser: nn.Module) -> bool:
    return hasattr(denoiser, "down_blocks") and hasattr(denoiser, "up_blocks")


def _check(denoiser: nn.Module, unit: Unit, text: str) -> None:
    try:
        layout_of(denoiser, unit)
    except DaccError as error:
        names = [name for name, _ in denoiser.named_modules() if name]
        advice = nearest(text.partition(":")[2], names) if isinstance(unit, ModuleUnit) else f"Forms: {UNIT_FORMS}."
        raise ConfigError(f"--unit {text}: {error.what}", mend=advice) from None
