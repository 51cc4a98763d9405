"""Round the layers of a unit one after the other, each against what the float network gives.

What a layer multiplies here, x, differs from what enters it in the float network, x~: layers before it are rounded, and
so is x itself. The weight and the bias that make up for both,

    min over V, c of  E ||W x~ + b - V x - c||^2    ->    V = W + W Cov(x~ - x, x) Cov(x, x)^-1,
                                                          c = b + W E[x~] - V E[x],

are rounded column by column as GPTQ does it (Frantar et al., 2022, arXiv 2210.17323; with float inputs as the target:
GPTAQ, Li et al., 2025, arXiv 2504.02692; with biases corrected: Nagel et al., 2019, arXiv 1906.04721). Without a bias
the second moments take the place of the covariances.

Letters: O rows, K input features per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.scheme import Scheme
from ..runtime.weight import to_rows
from .block import Block, Treated
from .entry import Watch
from .grid import Grid, find_grid
from .layerwise import BASELINE
from .methods import gptq, rtn
from .moments import Moments, moments_of
from .ranges import Finder, Search, find_scales
from .simulate import put_bias_, put_weight_, rounding_of


@dataclass(frozen=True)
class Rounded:
    """One layer after its turn."""

    treated: Treated
    grid: Grid | None  # None for a table that is looked up
    wanted: Tensor | None  # (O, K) values whose nearest codes the weight has


def round_in_turn(block: Block, search: Search | Finder) -> dict[str, Rounded]:
    """Quantize the layers of a unit in the order in which they run; the unit's own weights are as before afterwards."""
    found: dict[str, Rounded] = {}
    with torch.no_grad(), block.rounding.instead(dict.fromkeys(block.layers)), block.kept():
        for level in levels(block):
            ways = _ways(block.scheme(level[0]))
            moments = moments_of(block, level, ways, search)
            for name in level:
                found[name] = _round_layer(block, name, moments, search)
            for name in level:
                _put(block, name, found[name].treated)
    return {name: found[name] for name in block.layers}


def _put(block: Block, name: str, treated: Treated) -> None:
    layer = block.layers[name]
    put_weight_(layer, treated.weight)
    put_bias_(layer, treated.bias)
    block.rounding.put(name, rounding_of(treated.weight.scheme, layer, treated.acts))


def _ways(scheme: Scheme) -> list[Scheme]:
    """With the split and without it: two scales need not be better than one."""
    return [scheme, scheme.model_copy(update={"split": None})] if scheme.split else [scheme]


def _round_layer(block: Block, name: str, moments: Sequence[Moments], search: Search | Finder) -> Rounded:
    layer, scheme = block.layers[name], block.scheme(name)
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if isinstance(layer, nn.Embedding):
        return Rounded(Treated(rtn.quantize(weight, scheme, BASELINE), method="rtn"), None, None)
    if not moments:
        acts = find_scales(block.only([plan for plan in block.plans if plan.name == name]), search).get(name)
        rows, grid = to_rows(weight).float(), find_grid(to_rows(weight).float(), scheme, search=True)
        nearest = grid.pack(grid.nearest(rows), tuple(weight.shape))
        return Rounded(Treated(nearest, acts, method="rtn"), grid, rows)
    options = [_round_rows(name, layer, scheme, one) for one in moments]
    return min(options, key=lambda option: option.treated.output_error or 0.0)


def _round_rows(name: str, layer: nn.Module, scheme: Scheme, moments: Moments) -> Rounded:
    """One way to round a layer; its error is that of its outputs to those of the float network."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    rows, scheme = to_rows(weight).float(), scheme.model_copy(update={"split": moments.scheme.split})
    fitted = moments if bias is None else moments.about_means(rows, name)
    target = compensated(rows, fitted.gram, fitted.lag)
    grid = find_grid(target, scheme, search=True)
    codes, wanted = gptq.round_columns(target, fitted.gram, grid, gptq.GPTQConfig())
    scale, zero = grid.columns(rows.shape[1])
    rounded = (codes - zero) * scale
    error = error_of(rows, rounded, fitted, name) ** 0.5
    moved = None if bias is None else shifted_bias(bias, rows, rounded, moments)
    packed = grid.pack(codes, tuple(weight.shape))
    return Rounded(Treated(packed, moments.acts, output_error=error, bias=moved), grid, wanted)


def compensated(rows: Tensor, gram: Tensor, lag: Tensor, damping: float = 0.01) -> Tensor:
    """W + W L (H + d)^-1: the float weight that comes nearest to the float outputs on these inputs.

    In double precision one matrix (K, K) of a wide layer has gigabytes: there is never a second one.
    """
    moved = (rows.double() @ lag.double()).T  # (K, O)
    damped = torch.empty_like(gram, dtype=torch.float64).T.copy_(gram)  # column by column, as LAPACK works in place
    damped.diagonal().add_(damping * gram.diagonal().double().mean())
    lower, failed = torch.linalg.cholesky_ex(damped, out=(damped, damped.new_empty((), dtype=torch.int32)))
    if failed:
        return rows
    half = torch.linalg.solve_triangular(lower, moved, upper=False)  # unlike cholesky_solve this copies no factor
    shift = torch.linalg.solve_triangular(lower.T, half, upper=True).T
    return (rows.double() + shift).float()


def shifted_bias(bias: Tensor, rows: Tensor, rounded: Tensor, moments: Moments) -> Tensor:
    """b + W E[x~] - V E[x], (O,): the mean of the outputs becomes that of the float network. As it is stored."""
    change = rows @ (moments.mean + moments.drift) - rounded @ moments.mean
    return in_16_bits(bias.detach().float() + change)


def in_16_bits(values: Tensor) -> Tensor:
    """As float16, or as bfloat16 where float16 would overflow."""
    fits = float(values.abs().max()) <= torch.finfo(torch.float16).max
    return values.to(torch.float16 if fits else torch.bfloat16)


def error_of(rows: Tensor, rounded: Tensor, moments: Moments, name: str) -> float:
    """E ||W x~ - V x||^2 / E ||W x~||^2, never below 0."""
    change = rows - rounded
    gap = ((change @ moments.gram) * change).sum() + 2 * ((rows @ moments.lag) * change).sum()
    return max(float(gap) + moments.lost[name], 0.0) / max(moments.power[name], 1e-30)


def levels(block: Block) -> list[list[str]]:
    """Layers in the order in which they run; those that read the same tensor in the same way go together."""
    found: dict[Any, list[str]] = {}
    names = {id(layer): name for name, layer in block.layers.items()}
    kept: list[Tensor] = []  # so that no address is used twice

    def note(layer: nn.Module, x: Tensor) -> None:
        name = names[id(layer)]
        kept.append(x)
        scheme = block.scheme(name)
        geometry = [
            str(getattr(layer, fact, None)) for fact in ("kernel_size", "stride", "padding", "dilation", "groups")
        ]
        rounding = scheme.split, scheme.act_mode, scheme.act_group_size, scheme.act_offset, scheme.act_bits
        key = (x.data_ptr(), tuple(x.shape), *geometry, *rounding)
        if not any(name in level for level in found.values()):
            found.setdefault(key, []).append(name)

    with Watch((layer, note) for layer in block.layers.values()):
        for sighting in block.sightings[:1]:
            block.run(sighting)
    ran = [name for level in found.values() for name in level]
    return [*found.values(), *([name] for name in block.layers if name not in ran)]
