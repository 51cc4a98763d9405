"""Round the layers of a unit one after the other, each against what the float network gives.

What enters a layer here, x, differs from what enters it in the float network, x~, because layers before it are rounded,
and its activations will be rounded too, with noise n of variance v = scale^2 / 12. The weight that makes up for both,

    min over V of  E ||W x~ - V (x + n)||^2    ->    V = W + W (E[(x~ - x) x^T] - diag(v)) (E[x x^T] + diag(v))^-1,

is rounded column by column as GPTQ does it (Frantar et al., 2022, arXiv 2210.17323; with float inputs as the target:
GPTAQ, Li et al., 2025, arXiv 2504.02692).

Letters: O rows, K input features per row, N rows of x, P parts of the channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.scheme import Scheme
from ..runtime.activation import ActivationScale
from ..runtime.weight import spread, to_rows
from .block import Block, Sighting, Treated
from .grams import has_grams, some_rows
from .grid import Grid, find_grid
from .layerwise import BASELINE, check_finite
from .methods import gptq, rtn
from .ranges import Finder, Record, Search, find_scales, observed, scale_of
from .simulate import put_weight_, rounding_of

CALLS = 80  # that statistics are taken from; more: steadier, slower
ROWS = 32768  # of x, over all calls


@dataclass(frozen=True)
class Rounded:
    """One layer after its turn."""

    treated: Treated
    grid: Grid | None  # None for a table that is looked up
    wanted: Tensor | None  # (O, K) values whose nearest codes the weight has


@dataclass
class Moments:
    """E[x x^T] and E[(x~ - x) x^T] of one layer, (K, K) float32 each, and samples of x for its scales."""

    gram: Tensor
    lag: Tensor
    records: list[list[Record]]  # by part


def round_in_turn(block: Block, search: Search | Finder) -> dict[str, Rounded]:
    """Quantize the layers of a unit in the order in which they run; the unit's own weights are as before afterwards."""
    found: dict[str, Rounded] = {}
    floats = {name: layer.weight.detach().clone() for name, layer in block.layers.items()}  # type: ignore[operator]
    with torch.no_grad(), block.rounding.instead(dict.fromkeys(block.layers)):
        try:
            for level in _levels(block):
                moments = _moments(block, level)
                for name in level:
                    found[name] = _round_layer(block, name, moments, search)
                    _put(block, name, found[name].treated)
        finally:
            for name, layer in block.layers.items():
                layer.weight.copy_(floats[name])  # type: ignore[operator]
    return {name: found[name] for name in block.layers}


def _put(block: Block, name: str, treated: Treated) -> None:
    layer = block.layers[name]
    put_weight_(layer, treated.weight)
    block.rounding.put(name, rounding_of(treated.weight.scheme, layer, treated.acts))


def _round_layer(block: Block, name: str, moments: Moments | None, search: Search | Finder) -> Rounded:
    layer, scheme = block.layers[name], block.scheme(name)
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if isinstance(layer, nn.Embedding):
        return Rounded(Treated(rtn.quantize(weight, scheme, BASELINE), method="rtn"), None, None)
    rows = to_rows(weight).float()
    if moments is None:
        acts = find_scales(block.only([plan for plan in block.plans if plan.name == name]), search).get(name)
        grid = find_grid(rows, scheme, search=True)
        nearest = grid.pack(grid.nearest(rows), tuple(weight.shape))
        return Rounded(Treated(nearest, acts, method="rtn"), grid, rows)
    options = [_round_rows(rows, layer, option, moments, search) for option in _options(scheme)]
    error, codes, grid, wanted, acts = min(options, key=lambda option: option[0])
    treated = Treated(grid.pack(codes, tuple(weight.shape)), acts, output_error=max(error, 0.0) ** 0.5)
    return Rounded(treated, grid, wanted)


def _options(scheme: Scheme) -> list[Scheme]:
    """With the split and without it: two scales need not be better than one."""
    return [scheme, scheme.model_copy(update={"split": None})] if scheme.split else [scheme]


def _round_rows(
    rows: Tensor, layer: nn.Module, scheme: Scheme, moments: Moments, search: Search | Finder
) -> tuple[float, Tensor, Grid, Tensor, ActivationScale | None]:
    """Relative squared error up to a constant, codes, their grid, the values they stand for, activation scales."""
    acts = scale_of(scheme, _joined(moments.records, scheme.parts), search) if scheme.has_fixed_acts else None
    noise = noise_of(scheme, acts, moments.gram)
    gram = moments.gram + torch.diag(noise)
    target = compensated(rows, gram, moments.lag - torch.diag(noise))
    grid = find_grid(target, scheme, search=True)
    codes, wanted = gptq.round_columns(target, gram, grid, gptq.GPTQConfig())
    scale, zero = grid.columns(rows.shape[1])
    error = error_of(rows, (codes - zero) * scale, moments, noise)
    return error, codes, grid, wanted, acts


def compensated(rows: Tensor, gram: Tensor, lag: Tensor, damping: float = 0.01) -> Tensor:
    """W + W L (H + d)^-1: the float weight that comes nearest to the float outputs on these inputs."""
    damped = gram.double() + damping * gram.diagonal().double().mean() * torch.eye(len(gram), dtype=torch.float64)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return rows
    shift = torch.cholesky_solve((rows.double() @ lag.double()).T, lower).T
    return (rows.double() + shift).float()


def error_of(rows: Tensor, rounded: Tensor, moments: Moments, noise: Tensor) -> float:
    """(E ||W x~ - V (x + n)||^2 - E ||W (x~ - x)||^2) / E ||W x||^2: what is left out is the same for every V, and may
    be more than all the rest."""
    change = rows - rounded
    gap = ((change @ moments.gram) * change).sum() + 2 * ((rows @ moments.lag) * change).sum()
    gap = gap + ((rounded * noise) * rounded).sum()
    power = ((rows @ moments.gram) * rows).sum().clamp(min=1e-30)
    return float(gap / power)


def noise_of(scheme: Scheme, acts: ActivationScale | None, gram: Tensor) -> Tensor:
    """Variance (K,) that rounding adds to each input feature."""
    features = len(gram)
    if acts is not None:
        scales = acts.scale[:-1] if len(acts.scale) > 1 else acts.scale
        return spread((scales.square() / 12).mean(0, keepdim=True), features, scheme.split).view(-1)
    if scheme.act_bits == 16:
        return torch.zeros(features)
    peak = 16 * gram.diagonal().mean()  # of a token, at about four standard deviations
    return (peak / (2 ** (scheme.act_bits - 1) - 1) ** 2 / 12).expand(features)


def _joined(records: list[list[Record]], parts: int) -> list[list[Record]]:
    """What entered both parts together, for a scheme without the split."""
    if parts == len(records):
        return records
    return [[(call, seen.with_(other)) for (call, seen), (_, other) in zip(*records, strict=True)]]


def _levels(block: Block) -> list[list[str]]:
    """Layers in the order in which they run; those that read the same tensor in the same way go together."""
    levels: dict[Any, list[str]] = {}
    names = {id(layer): name for name, layer in block.layers.items()}
    kept: list[Tensor] = []  # so that no address is used twice

    def note(layer: nn.Module, args: tuple[Any, ...]) -> None:
        x, name = args[0], names[id(layer)]
        kept.append(x)
        scheme = block.scheme(name)
        geometry = [
            str(getattr(layer, fact, None)) for fact in ("kernel_size", "stride", "padding", "dilation", "groups")
        ]
        key = (x.data_ptr(), tuple(x.shape), *geometry, scheme.split, scheme.act_mode)
        if not any(name in level for level in levels.values()):
            levels.setdefault(key, []).append(name)

    hooks = [layer.register_forward_pre_hook(note) for layer in block.layers.values()]
    try:
        for sighting in block.sightings[:1]:
            block.run(sighting)
    finally:
        for hook in hooks:
            hook.remove()
    ran = [name for level in levels.values() for name in level]
    return [*levels.values(), *([name] for name in block.layers if name not in ran)]


class _Seen(Exception):  # no error: the rest of the unit need not run
    """The input of a layer is known."""


def _moments(block: Block, level: Sequence[str]) -> Moments | None:
    """Statistics of what enters the layers of one level; None where it does not multiply rows or never runs."""
    name = level[0]
    layer = block.layers[name]
    if not has_grams(layer):
        return None
    weighty = {id(sighting) for sighting in some_sightings(block.sightings)}
    count = max(1, ROWS // max(1, len(weighty)))
    features = to_rows(layer.weight).shape[1]  # type: ignore[arg-type]
    gram, lag = torch.zeros(features, features), torch.zeros(features, features)
    records: list[list[Record]] = [[] for _ in range(block.scheme(name).parts)]
    total = 0
    for number, sighting in enumerate(block.sightings):
        if id(sighting) not in weighty and not block.scheme(name).has_fixed_acts:
            continue
        if (x := _entering(block, name, sighting)) is None:
            continue
        seen = observed(name, block.scheme(name), layer, x, block.seed + number)
        for part, values in zip(records, seen, strict=True):
            part.append((sighting.call, values))
        if id(sighting) in weighty:
            rows = some_rows(layer, x, count, seed=number).float()
            intact = some_rows(layer, _entering_float(block, name, sighting, x), count, seed=number).float()
            gram.addmm_(rows.T, rows)
            lag.addmm_((intact - rows).T, rows)
            total += len(rows)
    if not total:
        return None
    check_finite(name, gram)
    return Moments(gram / total, lag / total, records)


def some_sightings(sightings: Sequence[Sighting]) -> Sequence[Sighting]:
    """At most `CALLS`, drawn at random."""
    if len(sightings) <= CALLS:
        return sightings
    chosen = torch.randperm(len(sightings), generator=torch.Generator().manual_seed(0))[:CALLS].sort().values
    return [sightings[index] for index in chosen.tolist()]


def _entering(block: Block, name: str, sighting: Sighting) -> Tensor | None:
    """What enters a layer in one call; None where it does not run."""
    with _caught(block.module.get_submodule(block.inside(name))) as found:
        _run_until_seen(block, sighting)
    return found[0] if found else None


def _entering_float(block: Block, name: str, sighting: Sighting, here: Tensor) -> Tensor:
    """What enters it in the float network; the same as here where no one asked for that network."""
    if sighting.intact is None or block.reference is None:
        return here
    intact = _entering(replace(block, module=block.reference), name, replace(sighting, entering=sighting.intact))
    assert intact is not None
    return intact


def _run_until_seen(block: Block, sighting: Sighting) -> None:
    with suppress(_Seen):
        block.run(sighting)


@contextmanager
def _caught(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Stops a run in front of a layer and keeps what was to enter it."""
    found: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0].detach())
        raise _Seen

    hook = layer.register_forward_pre_hook(catch)
    try:
        yield found
    finally:
        hook.remove()
