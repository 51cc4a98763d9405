"""What is removed from one denoiser, and why: its units, their scores, the choice of the method, the check of it."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from types import ModuleType
from typing import Any

from torch import nn

from ..core.errors import UnsupportedError
from ..core.manifest import PrunedUnit
from ..core.reporter import Reporter
from ..core.seeds import named_seed
from ..runtime.macs import count_macs
from ..runtime.passthrough import skipping
from ..runtime.timing import measure_in_turns
from .config import PruneConfig
from .masks import learn_masks
from .remove import Removal, plan_removal
from .request import Request
from .scores import UnitScore, of_outputs, score_units
from .select import greedily, permitted
from .settings import MaskConfig, MethodConfig, ScoredConfig, parse_groups
from .teacher import Errors, Teacher
from .unet import Modules
from .units import Unit, find_units, sizes_of

ADDS_UP = 1.5  # the error of a set over the sum of the scores of its units may be so much before scores are found anew
OVERSHOOT = 1.5  # so many times the ratio may go without a word
TIMED_RUNS = 5
LATENCY_STEP = 5e-5  # seconds: finer differences are noise
LATENCY_STEPS = 2000  # of a call at most: the exact choice takes time with their number
Known = MutableMapping[str, dict[str, float]]


@dataclass(frozen=True)
class Decision:
    """What goes from one denoiser."""

    removal: Removal
    units: dict[str, PrunedUnit]
    parameters: int  # of the whole denoiser
    error: float | None = None
    additivity: float | None = None
    latency_ms: dict[str, float] | None = None  # "whole" and what each unit takes of it, where it was measured


def decide(
    denoiser: nn.Module,
    config: PruneConfig,
    method: ModuleType,
    settings: MethodConfig,
    teacher: Teacher | None,
    known: Known,
    reporter: Reporter,
) -> Decision:
    """Choose by one method.

    Args:
        denoiser: the whole one; on the meta device where no teacher is needed.
        teacher: the same with its weights and what enters it, for methods that score.
        known: scores of an interrupted run; what is found is added.

    Raises:
        UnsupportedError: nothing can be removed, or not as much as is asked for.
    """
    kind = settings.units if isinstance(settings, ScoredConfig) else "auto"
    units = find_units(denoiser, strict=config.strict_config, kind=kind)
    total = sum(parameter.numel() for parameter in denoiser.parameters())
    scores: dict[str, UnitScore] = {}
    latency: dict[str, float] | None = None
    costs, whole = {unit.name: unit.parameters for unit in units}, total
    if teacher is not None and isinstance(settings, ScoredConfig):
        scores = score_units(settings.score, teacher, units, known, named_seed(config.seed, "task"), reporter)
        if settings.by == "latency":
            costs, whole, latency = _latencies(teacher, units, reporter)
    sizes = sizes_of(denoiser)
    fields: Any = denoiser.config
    request = Request(
        type(denoiser).__name__,
        dict(fields),
        Modules(sizes),
        sizes,
        units,
        config.ratio,
        config.strict_config,
        config.allow_adjacent,
        named_seed(config.seed, "choice"),
        costs,
        whole,
        scores,
    )
    removed: tuple[str, ...]
    error: float | None = None
    additivity: float | None = None
    if teacher is not None and isinstance(settings, MaskConfig):
        masks = learn_masks(teacher, method.groups(request, settings), settings, request.seed, known, reporter)
        removed, error = masks.removed, teacher.errors(masks.removed).relative
        scores = {name: UnitScore(kept) for name, kept in masks.kept.items()}
    else:
        removed = method.select(request, settings)
    if teacher is not None and isinstance(settings, ScoredConfig):
        removed, error, additivity = _checked(teacher, request, removed, known, method, settings, reporter)
    if not removed:
        raise UnsupportedError(
            f"nothing of this {request.class_name} would go.", mend="Ask for a --ratio, or use another --method."
        )
    removal = plan_removal(request.class_name, request.config, sizes, removed)
    if config.strict_config and removal.identity:
        raise UnsupportedError(
            f"the config of a {request.class_name} cannot tell that {removal.identity[0]} is gone.",
            "Without dacc it would be built with invented weights.",
            "Leave --strict-config out.",
        )
    if latency is None:
        _tell_of_overshoot(config.ratio, sum(sizes[name] for name in removal.removed) / total, reporter)
    macs = _macs(teacher, units) if teacher is not None else {}
    told = {unit.name: _told(unit, removed, scores.get(unit.name), macs.get(unit.name)) for unit in units}
    return Decision(removal, told, total, error, additivity, latency)


def _tell_of_overshoot(ratio: float | None, share: float, reporter: Reporter) -> None:
    if ratio is not None and share > OVERSHOOT * ratio:
        reporter.notice(f"a ratio of {ratio:g} was asked for and {share:.3g} of the parameters goes: units are coarse")


def _checked(
    teacher: Teacher,
    request: Request,
    removed: tuple[str, ...],
    known: Known,
    method: ModuleType,
    settings: ScoredConfig,
    reporter: Reporter,
) -> tuple[tuple[str, ...], float, float | None]:
    """The choice, what the outputs lose by it, and that over the sum of what they lose by each unit alone; a better
    choice where that is far from 1."""
    errors = teacher.errors(removed)
    error = errors.relative
    additivity = _additivity(request, removed, error, known) if settings.score == "out_mse" else None
    if additivity is None or additivity <= ADDS_UP or not getattr(method, "RESCORES", False):
        return removed, error, additivity
    rules = request.rules(parse_groups(settings.groups) if settings.groups else None)

    alone = [known[unit.name] for unit in request.units]

    def score(found: Errors) -> float:
        return of_outputs(asdict(found), alone)

    def rescored(before: tuple[int, ...], candidates: list[int]) -> list[float]:
        if not before:
            return [request.scores[request.units[place].name].score for place in candidates]
        sets = [[*before, place] for place in reporter.progress(candidates, "scoring anew")]
        found = [teacher.errors([name for at in places for name in request.units[at].modules]) for places in sets]
        return [score(errors) for errors in found]

    items = request.items({name: found.score for name, found in request.scores.items()})
    places = greedily(items, request.needed(), rules, rescored)
    assert permitted(items, places, rules)
    other = tuple(name for place in places for name in request.units[place].modules)
    other_errors = teacher.errors(other)
    other_error, better = other_errors.relative, score(other_errors) < score(errors)
    judged = ", by content and motion" if teacher.is_video else ""
    reporter.notice(
        f"the scores do not add up (the outputs lose {error:.4g}, {additivity:.2f} times their sum): units removed one "
        f"by one lose {other_error:.4g}, and {'that choice' if better else 'the first choice'} is taken{judged}"
    )
    if not better:
        return removed, error, additivity
    return other, other_error, _additivity(request, other, other_error, known)


def _additivity(request: Request, removed: Sequence[str], error: float, known: Known) -> float | None:
    """What the outputs lose over the sum of what they lose by each unit alone."""
    alone = sum(known[name]["relative"] for name in _names_of(request, removed))
    return error / alone if alone > 0 else None


def _names_of(request: Request, removed: Sequence[str]) -> list[str]:
    return [unit.name for unit in request.units if set(unit.modules) <= set(removed)]


def _told(unit: Unit, removed: Sequence[str], score: UnitScore | None, macs: int | None) -> PrunedUnit:
    found = score or UnitScore(0.0)
    return PrunedUnit(
        modules=unit.modules,
        parameters=unit.parameters,
        removed=all(_within(name, removed) for name in unit.modules),
        macs=macs,
        score=found.score if score else None,
        content=found.content,
        motion=found.motion,
    )


def _within(name: str, removed: Sequence[str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in removed)


def _macs(teacher: Teacher, units: Sequence[Unit]) -> dict[str, int]:
    """What each unit multiplies in one call."""
    call = teacher.calls[0]
    whole = count_macs(lambda: call.replay(teacher.denoiser))
    found = {}
    for unit in units:
        with skipping(teacher.denoiser, unit.modules):
            found[unit.name] = whole - count_macs(lambda: call.replay(teacher.denoiser))
    return found


def _latencies(
    teacher: Teacher, units: Sequence[Unit], reporter: Reporter
) -> tuple[dict[str, int], int, dict[str, float]]:
    """What each unit takes of the time of one call, that of the whole call, and both in milliseconds."""
    call = teacher.calls[0]

    def without(modules: Sequence[str]) -> None:
        with skipping(teacher.denoiser, modules):
            call.replay(teacher.denoiser)

    actions = [partial(without, modules) for modules in ((), *(unit.modules for unit in units))]
    whole, *others = (median(seconds) for seconds in measure_in_turns(actions, TIMED_RUNS, reporter))
    saved = {unit.name: max(0.0, whole - seconds) for unit, seconds in zip(units, others, strict=True)}
    told = {"whole": 1000 * whole, **{name: 1000 * seconds for name, seconds in saved.items()}}
    step = max(LATENCY_STEP, whole / LATENCY_STEPS)
    return {name: round(seconds / step) for name, seconds in saved.items()}, round(whole / step), told
