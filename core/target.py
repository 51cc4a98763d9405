"""Which products of small numbers a machine has, and what a scheme therefore executes as there. Nothing here imports
torch: the machine that a result is made for need not be the one that makes it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from .config import nearest
from .errors import ConfigError
from .scheme import Scheme

Product = Literal["int4", "int8", "fp8", "nvfp4"]
HERE = "here"  # the machine that runs dacc


@dataclass(frozen=True)
class Target:
    """One generation of machines."""

    name: str  # as an option has it
    title: str  # as a sentence has it
    products: tuple[Product, ...]  # in hardware, and at least as fast as 16-bit floats
    capabilities: tuple[tuple[int, int], ...] = ()  # compute capabilities of a GPU
    cards: tuple[str, ...] = ()  # patterns over names in lower case, without spaces, signs and the maker's words
    slow: tuple[Product, ...] = ()  # there for compatibility, slower than floats


TARGETS = (
    Target("cpu-int8", "a processor with 8-bit integer products", ("int8",),
           cards=("cpuvnni", "vnni", "avx512vnni", "avxvnni", "amx", "amxint8")),
    Target("cpu-float", "a processor without 8-bit integer products", (), cards=("avx2", "avx512", "avx512f")),
    Target("turing", "Turing", ("int4", "int8"), ((7, 5),), ("t4", "rtx20[678]0*", "quadrortx*", "titanrtx")),
    Target("ampere", "Ampere", ("int4", "int8"), ((8, 0), (8, 6), (8, 7)),
           ("a100*", "a800*", "a2", "a10", "a10g", "a16", "a30*", "a40*", "rtx30*", "rtxa*", "*orin*")),
    Target("ada", "Ada", ("int4", "int8", "fp8"), ((8, 9),), ("l4", "l20", "l40*", "rtx40[5-9]0*", "rtx*ada*")),
    Target("hopper", "Hopper", ("int8", "fp8"), ((9, 0),), ("h100*", "h200*", "h800*", "h20", "gh200*")),
    Target("blackwell", "Blackwell", ("int8", "fp8", "nvfp4"), ((10, 0),), ("b100*", "b200*", "gb200*")),
    Target("blackwell-ultra", "Blackwell Ultra", ("fp8", "nvfp4"), ((10, 3),), ("b300*", "gb300*"), slow=("int8",)),
    Target("blackwell-rtx", "Blackwell RTX", ("int8", "fp8", "nvfp4"), ((12, 0), (12, 1)),
           ("rtx50[5-9]0*", "rtxpro*", "gb10", "dgxspark")),
)  # fmt: skip
NAMES = tuple(target.name for target in TARGETS)
_BY_NAME = {target.name: target for target in TARGETS}
CPU_INT8, CPU_FLOAT = _BY_NAME["cpu-int8"], _BY_NAME["cpu-float"]


@dataclass(frozen=True)
class Execution:
    """How the products of one scheme are done on one target."""

    how: str
    lacks: str | None = None  # why that is not what the scheme is for; None: it is
    instead: str | None = None  # what to ask for there

    @property
    def sentence(self) -> str:
        """The whole of it for a person."""
        return self.how if self.lacks is None else f"{self.how}: {self.lacks}. {self.instead}"


def find_target(text: str) -> Target:
    """The machine that a user names: a name of the table, a compute capability (`sm90`, `9.0`) or a card (`RTX 4090`).

    Raises:
        ConfigError: none has this name.
    """
    if text in _BY_NAME:
        return _BY_NAME[text]
    if version := re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)a?", text.lower()):
        found = gpu_of_capability((int(version[1]), int(version[2])))
        if found is None:
            raise ConfigError(
                f"no GPU of compute capability {version[1]}.{version[2]} is known.", mend=f"Known: {_capabilities()}."
            )
        return found
    plain = re.sub(r"nvidia|geforce|[^a-z0-9]", "", text.lower())
    for target in TARGETS:
        if any(fnmatchcase(plain, card) for card in target.cards):
            return target
    raise ConfigError(
        f"--target {text!r} is no machine that dacc knows.",
        mend=f"{nearest(text, list(NAMES))} A compute capability, as sm90, or a card, as 'RTX 4090', does as well.",
    )


def gpu_of_capability(capability: tuple[int, int]) -> Target | None:
    """The generation of a GPU of NVIDIA; None where the table has none."""
    return next((target for target in TARGETS if capability in target.capabilities), None)


def _capabilities() -> str:
    return ", ".join(f"{major}.{minor}" for target in TARGETS for major, minor in target.capabilities)


def execution_of(scheme: Scheme, target: Target) -> Execution:
    """What a scheme executes as, with the kernels that dacc has."""
    if scheme.act_bits == 16:
        return Execution("float products, weights unpacked layer by layer")
    integers = "exact float products of the integers" if target is CPU_FLOAT else "int8 products"
    if scheme.act_group_size is not None:
        integers = f"{integers}, group by group"
    if scheme.bits <= 4 and scheme.act_bits <= 4:
        return Execution(f"4-bit values in {integers}", _no_int4(target), _instead_of_int4(target))
    if "int8" in target.products:
        return Execution(integers)
    if "int8" in target.slow:
        return Execution(integers, f"those of {target.title} are slower than its float ones", _FLOAT_ACTS)
    return Execution(integers, f"{target.title} gains no time by them", _FLOAT_ACTS)


_FLOAT_ACTS = "Leave --act-bits out: about the same file, less error, no slower."


def _no_int4(target: Target) -> str:
    if not target.capabilities:
        return "no processor multiplies 4-bit integers"
    if "int4" in target.products:
        return f"dacc has no kernels for the 4-bit integer products of {target.title}"
    if "nvfp4" in target.products:
        return f"{target.title} has no 4-bit integer products, but NVFP4 ones, for which dacc has no kernels"
    return f"{target.title} has no 4-bit integer products"


def _instead_of_int4(target: Target) -> str:
    """What is as fast there, or faster, with less error."""
    if "int8" not in target.products:
        return _FLOAT_ACTS
    eight = "--bits 8 --act-bits 8 runs on the same products with less error, --bits 4 --act-bits 8 in as small a file"
    return f"{eight}; FP8, which it has too, needs other software." if "fp8" in target.products else f"{eight}."
