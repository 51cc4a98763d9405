"""What enters the layers of a unit here and in the float network, as the statistics that rounding a weight needs.

x is what a layer will multiply: rounded, where its scheme rounds activations; x~ is what entered it in the float
network. Letters: O rows, K input features per row, N rows of x, P parts of the channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..core.scheme import Scheme
from ..runtime.activation import ActivationScale
from ..runtime.clock import fixed_run
from ..runtime.weight import to_rows
from .block import Block, Sighting, some_sightings
from .entry import Watch
from .grams import has_grams, some_rows
from .layerwise import check_finite
from .ranges import Finder, Record, Search, observed, scale_of
from .simulate import rounding_of

CALLS = 80  # that statistics are taken from; more: steadier, slower
ROWS = 32768  # of x, over all calls
STEADY = 2e-5  # share of E[x^2] up to which a variance is what float32 leaves of a difference of equals


@dataclass
class Moments:
    """Means over the rows of x, float32.

    Args:
        scheme: how x was rounded.
        acts: with which fixed scales.
        gram: E[x x^T], (K, K).
        lag: E[(x~ - x) x^T], (K, K).
        mean: E[x], (K,).
        drift: E[x~ - x], (K,).
        lost: layer -> E ||W (x~ - x)||^2, with W its float weight.
        power: layer -> E ||W x~||^2.
    """

    scheme: Scheme
    acts: ActivationScale | None
    gram: Tensor
    lag: Tensor
    mean: Tensor
    drift: Tensor
    lost: dict[str, float]
    power: dict[str, float]

    def about_means(self, rows: Tensor, name: str) -> Moments:
        """The same for a layer whose bias makes up for what differs in the mean. Features that never change have no
        moments left.

        Args:
            rows: W, (O, K).
        """
        apart = float((rows @ self.drift).square().sum())
        gram = torch.outer(-self.mean, self.mean).add_(self.gram)  # no third (K, K): those of a wide layer are large
        lag = torch.outer(-self.drift, self.mean).add_(self.lag)
        moving = gram.diagonal() > STEADY * self.gram.diagonal()
        return replace(
            self,
            gram=gram.mul_(moving).mul_(moving[:, None]),
            lag=lag.mul_(moving),
            lost={**self.lost, name: self.lost[name] - apart},
        )


class _Seen(Exception):  # no error: the rest of the unit need not run
    """The input of a layer is known."""


def moments_of(block: Block, level: Sequence[str], schemes: Sequence[Scheme], search: Search | Finder) -> list[Moments]:
    """Statistics of what enters layers that read one tensor, for each way in which they may round it; none where they
    do not multiply rows or never run.

    Raises:
        CalibrationError: NaN or infinity enters a layer.
    """
    name = level[0]
    layer = block.layers[name]
    if not has_grams(layer):
        return []
    records = _records(block, name) if block.scheme(name).has_fixed_acts else []
    gathering = [_Gathering(block, level, scheme, _scales(scheme, records, search)) for scheme in schemes]
    weighty = some_sightings(block.sightings, CALLS)
    count = max(1, ROWS // max(1, len(weighty)))
    for number, sighting in enumerate(weighty):
        if (x := _entering(block, name, sighting)) is None:
            continue
        intact = some_rows(layer, _entering_float(block, name, sighting, x), count, seed=number).float()
        for one in gathering:
            with fixed_run(sighting.state):
                here = some_rows(layer, one.rounding(x) if one.rounding else x, count, seed=number).float()
            one.add(here, intact)
    return [one.result_() for one in gathering if one.total]


class _Gathering:
    """Sums on their way to means."""

    def __init__(self, block: Block, level: Sequence[str], scheme: Scheme, acts: ActivationScale | None) -> None:
        layer = block.layers[level[0]]
        self.scheme, self.acts, self.name = scheme, acts, level[0]
        self.rounding = rounding_of(scheme, layer, acts)
        weights: dict[str, Tensor] = {name: block.layers[name].weight for name in level}  # type: ignore[misc]
        self.rows = {name: to_rows(weight.detach()).float() for name, weight in weights.items()}
        features = self.rows[self.name].shape[1]
        zeros = self.rows[self.name].new_zeros
        self.gram, self.lag = zeros(features, features), zeros(features, features)
        self.sums, self.drifts = zeros(features), zeros(features)
        self.lost, self.power, self.total = dict.fromkeys(level, 0.0), dict.fromkeys(level, 0.0), 0

    def add(self, here: Tensor, intact: Tensor) -> None:
        apart = intact - here
        self.gram.addmm_(here.T, here)
        self.lag.addmm_(apart.T, here)
        self.sums += here.sum(0)
        self.drifts += apart.sum(0)
        for name, rows in self.rows.items():
            self.lost[name] += float((apart @ rows.T).square().sum(dtype=torch.float64))
            self.power[name] += float((intact @ rows.T).square().sum(dtype=torch.float64))
        self.total += len(here)

    def result_(self) -> Moments:
        """The means, in the place of the sums."""
        check_finite(self.name, self.gram)
        gram, lag, mean, drift = (value.div_(self.total) for value in (self.gram, self.lag, self.sums, self.drifts))
        lost, power = ({name: value / self.total for name, value in found.items()} for found in (self.lost, self.power))
        return Moments(self.scheme, self.acts, gram, lag, mean, drift, lost, power)


def _records(block: Block, name: str) -> list[list[Record]]:
    """What enters a layer, for the search of its scales: every call, by part."""
    records: list[list[Record]] = [[] for _ in range(block.scheme(name).parts)]
    for number, sighting in enumerate(block.sightings):
        if (x := _entering(block, name, sighting)) is not None:
            seen = observed(name, block.scheme(name), block.layers[name], x, block.seed + number)
            for part, values in zip(records, seen, strict=True):
                part.append((sighting.call, values))
    return records


def _scales(scheme: Scheme, records: list[list[Record]], search: Search | Finder) -> ActivationScale | None:
    """For a scheme without the split of the records, both parts together."""
    if not scheme.has_fixed_acts:
        return None
    if scheme.parts < len(records):
        records = [[(call, seen.with_(other)) for (call, seen), (_, other) in zip(*records, strict=True)]]
    return scale_of(scheme, records, search)


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

    def catch(_: nn.Module, x: Tensor) -> None:
        found.append(x.detach())
        raise _Seen

    with Watch([(layer, catch)]):
        yield found
