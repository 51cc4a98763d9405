"""What a search is about: parts of one denoiser, the calls of a run, what they cost, and how many may compute.

Letters: C calls of a run, K calls that compute everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn

from ..core.cache_plan import Unit, UnitMacs
from ..core.errors import ConfigError
from ..core.reporter import Reporter
from ..runtime.cache_units import containers_of, layout_of
from ..runtime.request import RunRequest
from ..runtime.trajectory import DenoiserCall
from .budget import computed_calls
from .config import SearchCacheConfig
from .mixing import mixing_macs
from .profile import CallCost, count_unit_macs, first_calls, time_calls, told
from .shifting import tell_of_shifting
from .units import check_saving, choose_unit, unit_text
from .window import Window


@dataclass(frozen=True)
class Scene:
    """Some units of one denoiser in the runs of a request."""

    pipe: Any
    request: RunRequest
    denoiser: nn.Module
    units: tuple[Unit, ...]
    evaluations: list[DenoiserCall]  # of the first call, all guidance branches
    window: Window  # C calls
    macs: UnitMacs

    def measured_cost(self, known: Sequence[CallCost], reporter: Reporter) -> CallCost:
        """Seconds of a call with and without the units: those of an earlier search, or measured.

        Raises:
            ConfigError: those of an earlier search are of other units.
        """
        if known:
            return _of_units(known, self.units)
        return time_calls(self.denoiser, self.units, self.evaluations, reporter, self.pipe, self.request)

    def cheapest(self) -> float:
        """Multiply-accumulates over those of a full run, of one that computes the units at its first call alone."""
        inside = containers_of([layout_of(self.denoiser, unit) for unit in self.units])
        saved = sum(self.macs.units[unit.id] for unit in self.units if not inside[unit.id])
        return 1 - saved * (self.window.calls - 1) / (self.macs.full * self.window.calls)


@dataclass(frozen=True)
class Aim:
    """One unit and how many calls may compute it.

    Args:
        mixing: multiply-accumulates that correcting one call that reuses may take.
        computed: K, for methods that choose so many calls.
    """

    scene: Scene
    cost: CallCost | None  # in seconds, where the target is in them
    mixing: int
    computed: int

    @property
    def unit(self) -> Unit:
        """The part that is reused."""
        return self.scene.units[0]


def scene_of(
    pipe: Any,
    component: str,
    units: tuple[Unit, ...],
    config: SearchCacheConfig,
    request: RunRequest,
    reporter: Reporter,
) -> Scene:
    """Look at a denoiser of a pipeline that runs without plans.

    Raises:
        ConfigError: a unit that saves nothing.
        UnsupportedError: the denoiser cannot be cached so.
    """
    denoiser: nn.Module = pipe.components[component]
    tell_of_shifting(pipe, config, reporter)
    evaluations, window = first_calls(pipe, component, request)
    macs = count_unit_macs(denoiser, units, evaluations)
    check_saving(units, macs)
    return Scene(pipe, request, denoiser, units, evaluations, window, macs)


def aim_of(
    pipe: Any,
    component: str,
    config: SearchCacheConfig,
    method: ModuleType,
    settings: Any,
    request: RunRequest,
    reporter: Reporter,
    known_costs: Sequence[CallCost] = (),
) -> Aim:
    """What a method that treats one unit searches for, with its fields.

    Raises:
        ConfigError: a profile of another unit, a unit that there is not, or one that saves nothing.
        UnsupportedError: the denoiser cannot be cached so, or the target is out of reach.
    """
    denoiser: nn.Module = pipe.components[component]
    unit = choose_unit(denoiser, unit_text(config.unit, config.method, method, denoiser))
    scene = scene_of(pipe, component, (unit,), config, request, reporter)
    calls, macs = scene.window.calls, scene.macs
    rank = ranks_of(settings)  # a map is decided on by samples that are left out of its fit, so that needs some
    mixing = mixing_macs(denoiser, unit, scene.evaluations, rank) if rank and config.samples > 1 else 0
    least = method.least(calls, settings) if hasattr(method, "least") else 1
    if config.speedup is not None:
        cost = scene.measured_cost(known_costs, reporter)
        # what a correction takes in seconds is not timed: it is taken to follow its multiply-accumulates
        partial = cost.partial_seconds / cost.full_seconds + mixing / macs.full
        computed = computed_calls(calls, 1 / config.speedup, partial, wish="speedup", least=least)
        return Aim(scene, cost, mixing, computed)
    assert config.macs_ratio is not None
    partial = 1 - (macs.units[unit.id] - mixing) / macs.full
    computed = computed_calls(calls, config.macs_ratio, partial, wish="macs", least=least)
    return Aim(scene, None, mixing, computed)


def ranks_of(settings: Any) -> int:
    """How many ranks the map between channels has by which a method corrects what it reuses; 0 for none."""
    return settings.rank if hasattr(settings, "rank") and settings.correct else 0


def _of_units(costs: Sequence[CallCost], units: tuple[Unit, ...]) -> CallCost:
    """Of profiles of earlier that of these units.

    Raises:
        ConfigError: all are of others.
    """
    for cost in costs:
        if cost.unit == told(units):
            return cost
    raise ConfigError(
        f"the cost profile is of another unit ({costs[0].unit}).", mend="Measure anew: leave --cost-profile out."
    )
