"""Published smaller networks out of published larger ones: what `dacc prune` leaves, counted without weights.

    python benchmarks/prune_sizes.py                  # writes the table in docs/results.md

Networks are built from their configs on the meta device; names and shapes of all tensors that are left are those that
the smaller class builds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import torch
from torch import nn

from dacc.benchmarks.full_size_models import MODELS
from dacc.benchmarks.study import RESULTS, write_between
from dacc.core.config import build_config
from dacc.prune.config import METHODS
from dacc.prune.remap import sources_of
from dacc.prune.remove import plan_removal
from dacc.prune.request import Request
from dacc.prune.run import smaller
from dacc.prune.unet import Modules
from dacc.prune.units import find_units, sizes_of

DEEP, SINGLE = "transformer_blocks", "single_transformer_blocks"
Removed = tuple[str, ...]


@dataclass(frozen=True)
class Left:
    """A network after a removal."""

    parameters: int
    share: float  # of the whole
    plain: bool  # whether the config alone tells it, so that diffusers loads it without dacc


def whole(name: str) -> nn.Module:
    """A published network, without memory for its weights."""
    with torch.device("meta"):
        if name == "svd":
            return diffusers.UNetSpatioTemporalConditionModel(num_frames=25)  # its defaults are the published ones
        return MODELS[name].build(MODELS[name].published_depth)


def left_without(network: nn.Module, removed: Removed) -> Left:
    """Count what is left.

    Raises:
        ValueError: a tensor that the smaller class builds has no source of its shape.
    """
    names = list(sizes_of(network))
    removal = plan_removal(type(network).__name__, dict(network.config), names, removed)  # type: ignore[call-overload]
    small = smaller(network, removal)
    before, after = network.state_dict(), small.state_dict()
    sources = sources_of(list(before), removal.keep, removal.removed, removal.copies)
    if {new: before[old].shape for new, old in sources.items()} != {key: part.shape for key, part in after.items()}:
        raise ValueError(f"the tensors of {type(network).__name__} do not fit what is left of it")
    parameters = sum(value.numel() for value in small.parameters())
    return Left(parameters, parameters / sizes_of(network)[""], not removal.identity)


def chosen(network: nn.Module, method: str, ratio: float | None = None, **settings: object) -> Removed:
    """What a method that does not look at weights removes."""
    sizes, units = sizes_of(network), find_units(network)
    request = Request(
        type(network).__name__, dict(network.config), Modules(sizes), sizes, units, ratio, False, False, 0,  # type: ignore[call-overload]
        {unit.name: unit.parameters for unit in units}, sizes[""], {},
    )  # fmt: skip
    found = METHODS.load(method)
    removed: Removed = found.select(request, build_config(found.CONFIG, **settings))
    return removed


def koala(network: nn.Module, depth: int, *, middle: bool) -> Removed:
    """One layer in each stage, and the deepest attentions shortened, that of the middle too, or no middle."""
    layers = chosen(network, "bksdm", size="base")
    deepest = ("down_blocks.2.attentions.0", "up_blocks.0.attentions.0", "up_blocks.0.attentions.2")
    attentions = (*deepest, "mid_block.attentions.0") if middle else deepest
    blocks = [f"{at}.{DEEP}.{place}" for at in attentions for place in range(depth, 10)]
    return (*layers, *blocks) if middle else (*layers, *blocks, "mid_block")


def flux_of(doubles: int, singles: int) -> Removed:
    """All but so many blocks of each list."""
    return (
        *(f"{DEEP}.{place}" for place in range(1, 20 - doubles)),
        *(f"{SINGLE}.{place}" for place in range(38 - singles)),
    )


@dataclass(frozen=True)
class Row:
    """A published network."""

    name: str
    source: str
    removed: Callable[[nn.Module], Removed]
    published: str  # its parameters as the authors tell them


ROWS = (
    Row("BK-SDM-Base", "sd15", lambda network: chosen(network, "bksdm", size="base"), "579.4 M"),
    Row("BK-SDM-Small", "sd15", lambda network: chosen(network, "bksdm", size="small"), "482.3 M"),
    Row("BK-SDM-Tiny", "sd15", lambda network: chosen(network, "bksdm", size="tiny"), "323.4 M"),
    Row("KOALA-1B", "sdxl", lambda network: koala(network, 6, middle=True), "1161 M"),
    Row("KOALA-700M", "sdxl", lambda network: koala(network, 5, middle=False), "782.8 M"),
    Row("Flux-lite", "flux", lambda network: flux_of(8, 38), "8.16 B"),
    Row("Flux-mini", "flux", lambda network: flux_of(5, 10), "3.18 B"),
    Row("VDMini", "svd", lambda network: chosen(network, "vdmini"), "about 40 % fewer"),
)
HEAD = "| network | out of | parameters | fewer | published | loads without dacc |\n|---|---|---|---|---|---|"


def line_of(row: Row) -> str:
    """Its row of the table."""
    network = whole(row.source)
    left = left_without(network, row.removed(network))
    return (
        f"| {row.name} | {type(network).__name__} ({row.source}) | {left.parameters / 1e6:,.1f} M | "
        f"{1 - left.share:.1%} | {row.published} | {'yes' if left.plain else 'no: `identity_modules`'} |"
    )


def main() -> None:
    """Count all and write the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    lines = "\n".join(map(line_of, ROWS))
    write_between(RESULTS, "prune-sizes", {"full-size": f"{HEAD}\n{lines}"})


if __name__ == "__main__":
    main()
