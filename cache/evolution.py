"""The search over many units for one denoiser: profile, first plans, generations, the front, the plan that meets the
target. Every finished generation is kept, and what a later one does depends on it and the seed alone: a search that was
interrupted ends as it would have without.

Letters: P plans, C calls of a run, U units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from math import isfinite
from types import ModuleType
from typing import Any

import numpy

from ..core.cache_plan import COMPUTE, REUSE, CachePlan, CacheRecord
from ..core.config import build_config
from ..core.errors import ConfigError, UnsupportedError
from ..core.output import OutputWriter
from ..core.reporter import Reporter
from ..runtime.installed import remove_plans_
from ..runtime.request import RunRequest
from .budget import advice, asked
from .config import SearchCacheConfig
from .cost import feature_costs
from .front import Candidate, front_files
from .given import schedule_file, trimmed, whole_calls
from .methods import dp
from .objective import PlanObjective
from .planned import blank_plan
from .profile import CallCost
from .scene import Scene, scene_of
from .search import Found, count_plan
from .units import choose_units

Pair = tuple[float, float]  # error and MAC ratio


@dataclass
class State:
    """What a generation leaves behind. Tables are named by their bits in hexadecimal digits."""

    generation: int  # 0: the first plans are evaluated
    population: list[str]
    known: dict[str, Pair]  # of the population and of all plans that none beats

    def objectives(self) -> numpy.ndarray[Any, numpy.dtype[numpy.float64]]:
        """(P, 2)."""
        return numpy.array([self.known[name] for name in self.population])


class Keeper:
    """Keeps the state of a search in the journal of its output."""

    def __init__(self, journal: OutputWriter, component: str) -> None:
        self._journal, self._name, self._costs = journal, f"evolve:{component}/state", f"evolve:{component}/costs"

    def costs(self, measure: Callable[[], CallCost]) -> CallCost:
        """What calls take: measured once for a search, so that its target is the same after an interruption."""
        if self._costs not in self._journal.finished_units():
            self._journal.save_unit(self._costs, {}, measure().model_dump())
        return build_config(CallCost, **self._journal.unit_record(self._costs))

    def load(self) -> State | None:
        """The state that an interrupted run of the same search left; None for a new one."""
        if self._name not in self._journal.finished_units():
            return None
        record = self._journal.unit_record(self._name)
        known = {name: (pair[0], pair[1]) for name, pair in record["known"].items()}
        return State(record["generation"], record["population"], known)

    def save(self, state: State) -> None:
        """Put it in place of the last one, at once or not at all."""
        record = {"generation": state.generation, "population": state.population, "known": state.known}
        self._journal.save_unit(self._name, {}, record)


@dataclass
class _Search:
    """The plans of one denoiser as tables of bits."""

    objective: PlanObjective
    method: ModuleType
    settings: Any
    seed: int
    evaluated: dict[str, Pair] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """C and U."""
        return self.objective.blank.calls, len(self.objective.blank.units)

    @property
    def containers(self) -> list[list[int]]:
        """For each unit the places of those that it lies in."""
        names = [unit.id for unit in self.objective.blank.units]
        return [[names.index(outer) for outer in sorted(self.objective.containers[name])] for name in names]

    def name(self, table: Any) -> str:
        """The bits of a table (C, U)."""
        return str(numpy.packbits(table).tobytes().hex())

    def table(self, name: str) -> Any:
        """(C, U)."""
        calls, units = self.shape
        bits = numpy.unpackbits(numpy.frombuffer(bytes.fromhex(name), numpy.uint8))
        return bits[: calls * units].astype(bool).reshape(calls, units)

    def codes(self, name: str) -> dict[str, str]:
        """The table as codes of the units."""
        columns = self.table(name).T
        return {
            unit.id: "".join(COMPUTE if bit else REUSE for bit in column)
            for unit, column in zip(self.objective.blank.units, columns, strict=True)
        }

    def plan(self, name: str) -> CachePlan:
        """The table as a plan."""
        return self.objective.blank.model_copy(update={"codes": self.codes(name)})

    def evaluate(self, names: list[str]) -> dict[str, Pair]:
        """Error and MAC ratio of some tables; those that were tried in this process are not run again."""
        for name in names:
            if name not in self.evaluated:
                plan = self.plan(name)
                self.evaluated[name] = self.objective.error(plan), self.objective.macs_ratio(plan)
        return {name: self.evaluated[name] for name in names}

    def begin(self, seeds: Any) -> State:
        """The first plans, evaluated."""
        first = self.method.first_population(seeds, self.settings.population, self.containers, self.seed)
        names = [self.name(table) for table in first]
        return State(0, names, self.evaluate(names))

    def advance(self, state: State) -> State:
        """The next generation."""
        generation = state.generation + 1
        seed = self.seed * 1_000_003 + generation
        tables = numpy.stack([self.table(name) for name in state.population])
        born = self.method.children(tables, state.objectives(), self.containers, self.settings, seed)
        self.evaluated |= state.known
        known = state.known | self.evaluate([self.name(table) for table in born])
        everyone = list(dict.fromkeys([*state.population, *(self.name(table) for table in born)]))
        objectives = numpy.array([known[name] for name in everyone])
        kept = [everyone[place] for place in self.method.survivors(objectives, len(state.population), seed)]
        front = self.front(known)
        return State(generation, kept, {name: known[name] for name in dict.fromkeys([*front, *kept])})

    def front(self, known: dict[str, Pair]) -> list[str]:
        """Names of the plans that none beats, from the cheapest on. Those whose runs overflow are not among them."""
        names = sorted(name for name, (error, _) in known.items() if isfinite(error))
        return [names[place] for place in self.method.non_dominated([known[name] for name in names])]


def evolve_component(
    pipe: Any,
    component: str,
    config: SearchCacheConfig,
    method: ModuleType,
    request: RunRequest,
    weights: str,
    reporter: Reporter,
    known_costs: Sequence[CallCost],
    keeper: Keeper,
) -> Found:
    """Find the front of plans of one denoiser of a pipeline that runs without plans, and the one that meets the target.

    Args:
        config, request, weights, known_costs: see `search_component`.
        keeper: where finished generations are kept.

    Raises:
        ConfigError: the method's fields, a profile of other units, a unit that saves nothing, or pymoo is not
            installed.
        UnsupportedError: the denoiser cannot be cached so, the target is out of reach, or what meets it overflows.
    """
    settings = build_config(method.CONFIG, **config.settings)
    check_installed()
    units = choose_units(pipe.components[component], config.unit)
    scene = scene_of(pipe, component, units, config, request, reporter)
    denoiser, window = scene.denoiser, scene.window
    cost = None
    if config.speedup is not None:
        measure = partial(scene.measured_cost, known_costs, reporter)
        cost = measure() if known_costs else keeper.costs(measure)
    limit = limit_of(config, scene, cost)
    blank = blank_plan(denoiser, units, scene.macs, window.schedule, weights, config)
    state = keeper.load()
    seeds = _seeds(pipe, component, blank, request, settings, reporter) if state is None else None
    objective = PlanObjective(pipe, component, blank, window, request)
    search = _Search(objective, method, settings, config.seed)
    if state is None:
        state = search.begin(seeds)
        keeper.save(state)
    for _ in reporter.progress(range(state.generation, settings.generations), "evolving"):
        state = search.advance(state)
        keeper.save(state)
    remove_plans_(pipe)
    front = search.front(state.known)
    fitting = [name for name in front if state.known[name][1] <= limit]
    if not fitting:
        raise UnsupportedError(
            "no plan that meets the target has finite runs.",
            "Their numbers overflow, as may happen in float16.",
            "Ask for less, or search with --device cpu, in float32.",
        )
    chosen = min(fitting, key=lambda name: state.known[name])
    plan, _ = window.whole(trimmed(search.plan(chosen)), {})
    files = front_files(
        component,
        [Candidate(*state.known[name], window.whole(search.plan(name), {})[0].codes) for name in front],
        [state.known[name] for name in state.population],
        front.index(chosen),
    )
    record = CacheRecord.of(
        config.method,
        plan,
        count_plan(pipe, component, plan, window, request, reporter),
        {
            "calls": window.calls,
            "computed": whole_calls(plan) - plan.calls + window.calls,
            "generations": state.generation,
        },
    )
    return Found(record, (cost,) if cost else (), {}, files | schedule_file(component, denoiser, plan))


def _seeds(pipe: Any, component: str, blank: CachePlan, request: RunRequest, settings: Any, reporter: Reporter) -> Any:
    """First plans (S, C, U): at even distances for all units together, and by the dynamic programme for each alone."""
    counts = _counts(blank.calls, max(2, settings.population // 3))
    costs = feature_costs(pipe, component, blank, request, reporter)
    found = [numpy.ones((blank.calls, len(blank.units)), dtype=bool)]
    for computed in counts:
        even = numpy.zeros_like(found[0])
        even[[number * blank.calls // computed for number in range(computed)]] = True
        fitted = numpy.zeros_like(found[0])
        for place, unit in enumerate(blank.units):
            fitted[list(dp.schedule(blank.calls, computed, dp.DPConfig(), costs[unit.id])), place] = True
        found += [even, fitted]
    return numpy.stack(found)


def _counts(calls: int, wanted: int) -> list[int]:
    """Numbers of computed calls from few to all but one, denser where they are few."""
    if calls < 3:
        return [1]
    return sorted({round((calls - 1) ** (number / (wanted - 1))) for number in range(wanted)})


def limit_of(config: SearchCacheConfig, scene: Scene, cost: CallCost | None) -> float:
    """The MAC ratio that the chosen plan may have. Seconds are taken to follow the MACs that are saved.

    Args:
        cost: what calls take, where the target is in seconds.

    Raises:
        UnsupportedError: skipping everything after the first call is still too dear.
    """
    calls, cheapest = scene.window.calls, scene.cheapest()
    if cost is None:
        assert config.macs_ratio is not None
        limit, told, best = config.macs_ratio, asked("macs", config.macs_ratio), cheapest
    else:
        assert config.speedup is not None
        saved = 1 - min(1.0, cost.partial_seconds / cost.full_seconds)  # of a call's seconds, all units skipped
        share = (1 - cheapest) * calls / max(1, calls - 1)  # of its MACs
        limit = 1 - (1 - 1 / config.speedup) * share / saved if saved > 0 else -1.0
        told, best = asked("speedup", 1 / config.speedup), 1 - saved * (calls - 1) / calls
    if cheapest > limit:
        raise UnsupportedError(
            f"these units cannot give {told}: a run that computes them at its first call only costs {cheapest:.3f} of "
            "the full one.",
            *advice(calls, best, wish="macs" if cost is None else "speedup"),
        )
    return limit


def check_installed() -> None:
    """Refuse the search where the packages are missing that it takes.

    Raises:
        ConfigError: see above.
    """
    for package in ("pymoo", "matplotlib"):
        if find_spec(package) is None:
            raise ConfigError(
                f"--method evolve needs the package {package}, which is not installed.",
                mend="Install it: pip install 'dacc-diffusion[evolve]'.",
            )
