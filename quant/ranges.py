"""Fixed activation scales: what enters the layers of a unit is observed over a calibration set, and the range that its
integers cover is searched for.

The candidates and the 2.4-norm by which they are judged are those of post-training quantization since LAPQ and Nagel et
al. (2021, arXiv 2106.08295): clipping rare extremes makes the steps between all other values finer.

Letters: S rows of a table (one for each call and a last one for all; a single one for static scales), P parts of the
channels, N observed values, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.errors import CalibrationError
from ..core.scheme import Scheme
from ..runtime.activation import ActivationScale
from ..runtime.clock import current_run
from .block import Block, Treated
from .entry import Watch
from .simulate import Rounding, channel_axis, put_bias_, put_weight_, rounding_of

Search = Literal["minmax", "mse"]
Range = tuple[Tensor, Tensor]  # lowest and highest value that the integers cover, 0-dim each
NORM = 2.4
CANDIDATES = 80  # shares of the range: 1, 0.99, ... 0.21
VALUES = 4096  # kept of what enters one layer in one call; more: steadier, slower
UNSEEN = 8.0  # largest value that is expected where nothing was seen
VALUES_OF_TABLE = 1 << 16  # kept for the row of all calls


@dataclass
class Observed:
    """Values that entered one part of a layer's channels in one call of the grid."""

    values: Tensor  # (N,) float32, drawn at random
    low: float
    high: float

    def with_(self, other: Observed) -> Observed:
        """Both together."""
        return Observed(torch.cat([self.values, other.values]), min(self.low, other.low), max(self.high, other.high))


Record = tuple[int, Observed]  # number of the call, what entered
Finder = Callable[[list[Observed], int], Range]  # batches of one row, bits -> range


def find_scales(block: Block, search: Search | Finder = "mse") -> dict[str, ActivationScale]:
    """Scales of every layer of a unit whose scheme has fixed ones, for its weights as they are now.

    Args:
        search: how to find a range; a function gets what was observed, record by record.

    Raises:
        CalibrationError: NaN or infinity enters a layer.
    """
    names = [name for name in block.layers if block.scheme(name).has_fixed_acts]
    seen = observe(block, names) if names else {}
    scales = {name: scale_of(block.scheme(name), records, search) for name, records in seen.items()}
    # of a layer that no call reaches they were made on the CPU
    return {name: found.to(block.layers[name].weight.device) for name, found in scales.items()}  # type: ignore[union-attr, arg-type]


def observe(block: Block, names: list[str]) -> dict[str, list[list[Record]]]:
    """Run the unit on its calls; for each layer and part, what entered with the number of the call."""
    found: dict[str, list[list[Record]]] = {name: [[] for _ in range(block.scheme(name).parts)] for name in names}
    looks = [(block.layers[name], _watch(name, block.scheme(name), found[name], block.seed)) for name in names]
    # A layer is watched before it is rounded itself, behind layers that are rounded already
    with Watch(looks), torch.no_grad(), block.rounding.instead(dict.fromkeys(block.layers)):
        for sighting in block.sightings:
            block.run(sighting)
    return found


def _watch(name: str, scheme: Scheme, found: list[list[Record]], seed: int) -> Any:
    def watch(layer: nn.Module, x: Tensor) -> None:
        state = current_run()
        parts = observed(name, scheme, layer, x, seed + len(found[0]))
        for records, seen in zip(found, parts, strict=True):
            records.append((state.call if state else 0, seen))

    return watch


def observed(name: str, scheme: Scheme, layer: nn.Module, x: Tensor, seed: int) -> list[Observed]:
    """What enters a layer once, for each part of its channels.

    Raises:
        CalibrationError: it holds NaN or infinity.
    """
    x, axis, generator = x.detach().float(), channel_axis(layer), torch.Generator().manual_seed(seed)
    found = []
    for part in x.split([scheme.split, x.shape[axis] - scheme.split], dim=axis) if scheme.split else (x,):
        flat = part.flatten()
        low, high = (float(value) for value in flat.aminmax())
        if not (low > -torch.inf and high < torch.inf):
            raise CalibrationError(
                f"what enters {name} holds NaN or infinity.",
                "The float network overflows on this calibration set.",
                "See whether the float pipeline makes images from the same inputs; calibrate with others.",
            )
        chosen = torch.randint(len(flat), (min(VALUES, len(flat)),), generator=generator)
        found.append(Observed(flat[chosen], low, high))
    return found


def scale_of(scheme: Scheme, parts: list[list[Record]], search: Search | Finder) -> ActivationScale:
    """The table of one layer from what was observed in each part of its channels."""
    finder = search if callable(search) else {"minmax": _covering, "mse": _least_error}[search]
    columns = [_rows(scheme, records, finder) for records in parts]
    scale, zero_point = (torch.stack([column[kind] for column in columns], dim=1) for kind in (0, 1))
    return ActivationScale(scale, zero_point)


def _rows(scheme: Scheme, records: list[Record], finder: Finder) -> tuple[Tensor, Tensor]:
    """(S,) scales and zero points of one part."""
    if not records:  # a layer that no call reaches
        scale, zero = _guess(scheme.act_bits)
        size = (scheme.act_steps or 0) + 1
        return scale.expand(size).clone(), zero.expand(size).clone()
    everything = [seen for _, seen in records]
    ranges = []
    if scheme.act_mode == "per-step":
        assert scheme.act_steps is not None
        calls = sorted({call for call, _ in records})
        by_call = {call: finder([seen for place, seen in records if place == call], scheme.act_bits) for call in calls}
        nearest = (min(calls, key=lambda call: abs(call - step)) for step in range(scheme.act_steps))
        ranges = [by_call[call] for call in nearest]
    ranges.append(finder(everything, scheme.act_bits))
    grids = [grid_of(low, high, scheme.act_bits) for low, high in ranges]
    return torch.stack([scale for scale, _ in grids]), torch.stack([zero for _, zero in grids])


def _guess(bits: int) -> tuple[Tensor, Tensor]:
    return grid_of(torch.tensor(-UNSEEN), torch.tensor(UNSEEN * (1 - 2.0 ** (1 - bits))), bits)


def is_guessed(acts: ActivationScale, bits: int) -> bool:
    """Whether a table is that of a layer that no call reaches, as far as learning does not tell the two apart."""
    scale, zero = _guess(bits)
    return bool(acts.scale.isclose(scale).all() and (acts.zero_point == zero).all())


def grid_of(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero point (uint8) that cover [low, high]; the range is widened to hold 0."""
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, (-low / scale).round().clamp(0, 2**bits - 1).to(torch.uint8)


def _covering(records: list[Observed], bits: int) -> Range:
    """The lowest and the highest value."""
    filled = records[0].values.new_full
    return filled((), min(seen.low for seen in records)), filled((), max(seen.high for seen in records))


def _least_error(records: list[Observed], bits: int) -> Range:
    """The shrunken range with the least error; both ends shrink by the same factor."""
    low, high = _covering(records, bits)
    shares = 1 - 0.01 * torch.arange(CANDIDATES, device=low.device)
    return best_range(_thinned(records), low * shares, high * shares, bits)


def best_range(values: Tensor, low: Tensor, high: Tensor, bits: int) -> Range:
    """Among ranges (C,), the one whose integers lie nearest to the values (N,), by the mean of |x - x^|^2.4."""
    scale, zero = grid_of(low, high, bits)
    scale, zero = scale[:, None], zero[:, None].float()
    codes = (values / scale).round_().add_(zero).clamp_(0, 2**bits - 1)
    apart = codes.sub_(zero).mul_(scale).sub_(values).abs_()
    error = apart.log2_().mul_(NORM).exp2_().mean(1)  # a power with a fraction, several times as fast as pow
    best = int(error.argmin())
    return low[best], high[best]


def _thinned(records: list[Observed]) -> Tensor:
    """The values of all records, every n-th one where they are very many."""
    values = torch.cat([seen.values for seen in records])
    return values[:: -(-len(values) // VALUES_OF_TABLE)]


@torch.no_grad()
def with_scales(block: Block, treated: dict[str, Treated], search: Search | Finder) -> dict[str, Treated]:
    """Add the fixed activation scales of a unit, found with its quantized weights at work."""
    with quantized_weights(block, treated):
        scales = find_scales(block, search)
    return {name: replace(found, acts=scales.get(name)) for name, found in treated.items()}


@contextmanager
def quantized_weights(block: Block, treated: dict[str, Treated]) -> Iterator[None]:
    """Let the unit compute with what a method made of its weights and biases, for a while."""
    with block.kept():
        for name, layer in block.layers.items():
            put_weight_(layer, treated[name].weight)
            put_bias_(layer, treated[name].bias)
        yield


def roundings_of(block: Block, treated: dict[str, Treated]) -> dict[str, Rounding | None]:
    """How the layers of a unit round what enters them, after a method treated them."""
    return {name: rounding_of(found.weight.scheme, block.layers[name], found.acts) for name, found in treated.items()}


def dynamic_roundings(block: Block) -> dict[str, Rounding | None]:
    """How the layers of a unit round what enters them, where that needs no observation.

    Not of those that may have smoothing factors: rounding without these loses the quiet channels that they save, and
    what is seen of these channels then tells that they need none.
    """
    return {
        name: rounding_of(block.scheme(name), layer, None)
        for name, layer in block.layers.items()
        if block.scheme(name).finds_acts and not block.scheme(name).smooth
    }
