"""The search for one denoiser: profile, budget, method, plan, and what a run with it costs, counted.

Letters: C calls of a run, K calls that compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor

from ..core.cache_plan import REUSE, CachePlan, CacheRecord, CorrectionId
from ..core.config import build_config
from ..core.reporter import Reporter
from ..core.seeds import SeedKind, seed_stream
from ..core.tensor_file import content_hash
from ..runtime.correction import Correction
from ..runtime.decode_ahead import has_step_scales
from ..runtime.installed import install_plan_, no_cache, remove_plans_
from ..runtime.plan import planned_macs
from ..runtime.request import RunRequest
from .config import SearchCacheConfig, needs_of
from .correct import Pairs, corrected_plan, profile_pairs
from .correct_layers import fit_layers, layers_to_correct
from .cost import feature_costs, output_cost
from .fitting import Grams, fitted_plan
from .forecast_cost import forecast_cost
from .gating import gated_plan
from .mixing import mixed_calls, mixing_moments, with_mixing
from .moving import Choice, Trial, anywhere, best_choice
from .objective import PlanObjective
from .planned import blank_plan, planned
from .profile import CallCost, counted_macs
from .scene import aim_of, ranks_of
from .window import Window

REACH = 4  # groups are looked for up to this many times their mean length, where evaluations have to be paid for


@dataclass(frozen=True)
class Profile:
    """What a search knows of the model.

    Args:
        told: what the method wants to know, behind calls and fields.
        grams: what forecasts can be fitted with.
        pairs: what the correction of reused values can be fitted with.
    """

    told: tuple[Any, ...] = ()
    grams: Grams | None = None
    pairs: Pairs | None = None

    def fitted(self, plan: CachePlan, ridge: float | None = None) -> tuple[CachePlan, dict[str, Tensor]]:
        """A plan with what is fitted for it: forecasts where a ridge is given, else what it reuses, where known."""
        if self.grams is not None and ridge is not None:
            return fitted_plan(plan, self.grams, ridge)
        return corrected_plan(plan, self.pairs) if self.pairs is not None else (plan, {})


@dataclass(frozen=True)
class Found:
    """A plan and what was decided on the way."""

    record: CacheRecord
    costs: tuple[CallCost, ...]  # call times that were measured or known, one for each unit that was tried
    tables: dict[str, Tensor]  # of the plan's correction, if it has one
    files: dict[str, bytes] = field(default_factory=dict)  # what else the search has to tell, by name in the bundle

    def install_(self, pipe: Any, component: str) -> None:
        """Let a denoiser run with it."""
        plan = self.record.plan
        install_plan_(pipe, component, plan, Correction(self.tables, plan) if plan.correction else None)


def search_component(
    pipe: Any,
    component: str,
    config: SearchCacheConfig,
    method: ModuleType,
    request: RunRequest,
    weights: str,
    reporter: Reporter,
    known_costs: Sequence[CallCost] = (),
    reference: Any | None = None,
) -> Found:
    """Find the plan of one denoiser of a pipeline that runs without plans.

    Args:
        config: resolved.
        request: the runs to profile.
        weights: hash of the denoiser's weight files.
        known_costs: call times of an earlier search, in place of measuring.
        reference: the float pipeline that a quantized one was made from.

    Raises:
        ConfigError: the method's fields, a profile of another unit, or a unit that saves nothing.
        UnsupportedError: the denoiser cannot be cached so, or the target is out of reach.
    """
    settings = build_config(method.CONFIG, **config.settings)
    aim = aim_of(pipe, component, config, method, settings, request, reporter, known_costs)
    unit, denoiser, window, macs = aim.unit, aim.scene.denoiser, aim.scene.window, aim.scene.macs
    computed, mixing, rank = aim.computed, aim.mixing, ranks_of(settings)
    blank = blank_plan(denoiser, (unit,), macs, window.schedule, weights, config)
    profile = _profile(pipe, component, blank, window, method, settings, request, computed, reporter, reference)
    chosen: dict[str, int | float | str] = {"calls": window.calls}
    ridge = None
    if profile.told and getattr(settings, "trials", 0) > 0:
        candidates = method.candidates(window.calls, computed, settings, *profile.told)
        objective = PlanObjective(pipe, component, blank, window, other_samples("trials", request, config), reference)
        trial = _run_trials(objective, method, settings, candidates, profile, reporter)
        remove_plans_(pipe)  # the last one that was tried
        settings, places, ridge = trial.best.settings, trial.best.places, trial.best.ridge
        chosen |= {"trials": trial.made, "relative_l2": float(f"{trial.least:.4g}")}
    else:
        places = method.schedule(window.calls, computed, settings, *profile.told)
    chosen["computed"] = len(places)
    if hasattr(method, "gate"):
        plan, more = gated_plan(pipe, component, blank, places, computed, method, settings, window, request, reporter)
        chosen |= more
    else:
        plan = planned(blank, places, method, settings)
    if plan.decode_ahead > 1 and has_step_scales(denoiser):
        reporter.notice(
            f"{component}: calls are decoded one by one, its layers have scales of their own for every call"
        )
        plan = plan.model_copy(update={"decode_ahead": 1})
    plan, tables = profile.fitted(plan, ridge)
    if ridge is not None:
        chosen["ridge"] = ridge
    elif tables and rank:
        moments = mixing_moments(pipe, component, plan, tables, request, reporter, reference)
        plan, tables = with_mixing(plan, tables, moments, rank, reporter)
        chosen["mixed"] = mixed_calls(tables)
        mixing = mixing if chosen["mixed"] else 0
    if ridge is None and tables and reference and settings.layers and layers_to_correct(denoiser, plan):
        plan, tables = _with_layers(pipe, component, plan, tables, request, reporter, reference)
    plan, tables = window.whole(plan, tables)
    ratio = count_plan(pipe, component, plan, window, request, reporter, mixing=mixing)
    if plan.gates:
        partial = 1 - macs.units[unit.id] / macs.full
        chosen["computed"] = round(window.calls * (ratio - partial) / (1 - partial), 1)
    record = CacheRecord.of(config.method, plan, ratio, chosen)
    return Found(record, (aim.cost,) if aim.cost else (), tables)


def other_samples(stream: SeedKind, request: RunRequest, config: SearchCacheConfig) -> RunRequest:
    """Runs that choose: of other samples than those by which what they choose from was fitted, or chosen in its turn,
    which make it look better than it is."""
    return request.model_copy(update={"seeds": seed_stream(stream, config.seed, len(request.seeds))})


def _run_trials(
    objective: PlanObjective,
    method: ModuleType,
    settings: Any,
    candidates: list[Choice],
    profile: Profile,
    reporter: Reporter,
) -> Trial:
    """The candidate whose runs are nearest to those without a plan, its calls moved for as long as that helps."""
    blank = objective.blank
    bounded = hasattr(method, "permits")
    with closing(reporter.progress(range(max(settings.trials, len(candidates))), "trying plans")) as runs:

        def error(choice: Choice) -> float:
            next(runs)
            plan = planned(blank, choice.places, method, choice.settings)
            return objective.error(*profile.fitted(plan, choice.ridge))

        return best_choice(
            candidates,
            error,
            calls=blank.calls,
            fixed=getattr(settings, "warmup", 1),
            trials=settings.trials,
            permits=partial(method.permits, calls=blank.calls, config=settings) if bounded else anywhere,
        )


def _with_layers(
    pipe: Any,
    component: str,
    plan: CachePlan,
    tables: dict[str, Tensor],
    request: RunRequest,
    reporter: Reporter,
    reference: Any,
) -> tuple[CachePlan, dict[str, Tensor]]:
    """The plan with the correction of the quantized layers that read what it reuses as well, and all tables."""
    tables = tables | fit_layers(pipe, component, plan, tables, request, reporter, reference)
    layers = layers_to_correct(pipe.components[component], plan)
    return plan.model_copy(update={"correction": CorrectionId(sha256=content_hash(tables), layers=layers)}), tables


def count_plan(
    pipe: Any,
    component: str,
    plan: CachePlan,
    window: Window,
    request: RunRequest,
    reporter: Reporter,
    *,
    mixing: int = 0,
) -> float:
    """Install a plan and count what a run of one sample costs with it, over one without; with a gate, what all the
    profiled runs do, since each decides by itself.

    A count that is not the predicted one is a notice: guidance that ends before the run does makes calls cheaper.

    Args:
        mixing: what the correction of a call that reuses costs; it is not installed here.
    """
    units = install_plan_(pipe, component, plan)
    if not plan.gates:
        request = request.model_copy(update={"seeds": request.seeds[:1], "batch_size": 1})
    with no_cache(pipe):
        full = counted_macs(pipe, component, request)
    cached = counted_macs(pipe, component, request)
    if plan.gates:
        return cached / full
    predicted = planned_macs(plan, units.containers) - plan.macs.full * (plan.calls - window.calls)
    if (full, cached) != (plan.macs.full * window.calls, predicted):
        reporter.notice(f"{component}: a run counts {cached} of {full} MACs; the plan predicts {predicted}")
    return (cached + mixing * sum(codes.count(REUSE) for codes in plan.codes.values())) / full


def _profile(
    pipe: Any,
    component: str,
    plan: CachePlan,
    window: Window,
    method: ModuleType,
    settings: Any,
    request: RunRequest,
    computed: int,
    reporter: Reporter,
    reference: Any | None,
) -> Profile:
    """What the method needs to know of the model."""
    needs = needs_of(method, settings)
    if "forecasts" in needs:
        predictor = method.predictor(settings)
        fit = settings.correct
        forecasts = forecast_cost(
            pipe, component, plan, window, request, predictor, reporter, fit=fit, reference=reference
        )
        return Profile((forecasts,), grams=forecasts.grams)
    if "cost" not in needs:
        return Profile()
    if settings.cost == "feature":
        costs = feature_costs(pipe, component, plan, request, reporter, reference)[plan.units[0].id]
        pairs = profile_pairs(pipe, component, plan, request, reporter, reference) if settings.correct else None
        return Profile((costs,), pairs=pairs)
    longest = min(plan.calls, REACH * -(-plan.calls // computed))
    pairs = Pairs() if settings.correct else None
    costs = output_cost(
        pipe, component, plan, window, request, reporter, longest=longest, reference=reference, pairs=pairs
    )
    return Profile((costs,), pairs=pairs)
