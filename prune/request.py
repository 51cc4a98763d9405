"""What a method is given to choose from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..core.errors import UnsupportedError
from .config import KEPT_PROMISE
from .select import Item, Rules
from .unet import Modules

if TYPE_CHECKING:
    from .scores import UnitScore
    from .units import Unit


@dataclass(frozen=True)
class Request:
    """A denoiser and what is wanted of it.

    Args:
        class_name: of the denoiser.
        config: all fields of its config.
        modules: its lists.
        sizes: parameters of each of its modules.
        units: what may be removed; what the rules protect is not among them.
        ratio: share of `total` to remove; None: as the method thinks best.
        strict: only what the config can express.
        allow_adjacent: neighbours may both go.
        seed: of this component, for methods that draw.
        costs: of each unit, whole numbers: parameters, or time.
        total: of the whole denoiser.
        scores: of each unit; empty for methods that do not need them.
    """

    class_name: str
    config: Mapping[str, Any]
    modules: Modules
    sizes: Mapping[str, int]
    units: Sequence[Unit]
    ratio: float | None
    strict: bool
    allow_adjacent: bool
    seed: int
    costs: Mapping[str, int]
    total: int
    scores: Mapping[str, UnitScore]

    def needed(self) -> int:
        """What the removed units must cost together."""
        assert self.ratio is not None
        return max(1, round(KEPT_PROMISE * self.ratio * self.total))

    def items(self, scores: Mapping[str, float]) -> list[Item]:
        """The units as `select.py` takes them."""
        return [Item(scores[unit.name], self.costs[unit.name], unit.stack, unit.position) for unit in self.units]

    def with_units(self, units: Sequence[Unit]) -> Request:
        """The same with fewer units."""
        return replace(self, units=units)

    def rules(self, groups: tuple[int, int] | None = None) -> Rules:
        """What may go together."""
        return Rules(allow_adjacent=self.allow_adjacent, groups=groups)

    def out_of_reach(
        self, largest: int, what: str = "parameters", *, takes_neighbours: bool = False
    ) -> UnsupportedError:
        """The refusal of a ratio, with the nearest one that can be met.

        Args:
            takes_neighbours: the method does so whether or not it is allowed.
        """
        places = {(unit.stack, unit.position) for unit in self.units}
        neighbours = any((stack, place + 1) in places for stack, place in places)
        freer = ["--allow-adjacent"] if neighbours and not (takes_neighbours or self.allow_adjacent) else []
        freer += ["no --strict-config"] if self.strict else []
        return UnsupportedError(
            f"a ratio of {self.ratio:g} of the {what} of this {self.class_name} cannot be removed.",
            f"What may go makes up {largest / self.total:.4f} of them.",
            f"Ask for --ratio {int(1e4 * largest / self.total) / 1e4:g} or less"
            + (f", or give {' or '.join(freer)}." if freer else "."),
        )
