"""The method "auto": several are tried at the same target, and the one nearest to runs without a plan wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

from torch import Tensor

from ..core.errors import ConfigError, UnsupportedError
from ..core.reporter import Reporter
from ..runtime.compare import relative_l2
from ..runtime.installed import remove_plans_
from ..runtime.request import RunRequest
from ..runtime.trajectory import sample
from .config import METHODS, TRIED, SearchCacheConfig
from .objective import typical
from .profile import CallCost
from .search import Found, other_samples, search_component
from .units import unit_text


def search_auto(
    pipe: Any,
    component: str,
    config: SearchCacheConfig,
    request: RunRequest,
    weights: str,
    reporter: Reporter,
    known_costs: Sequence[CallCost] = (),
    reference: Any | None = None,
) -> Found:
    """The best of several plans for one denoiser, by the relative L2 of the final latents of runs of other samples.

    Arguments and errors are those of `search_component`. A method that the target does not fit, or whose plan has runs
    that are not finite, is left out (a notice).
    """
    others = other_samples("auto", request, config)
    wanted = sample(reference or pipe, others).latents
    found: dict[str, Found] = {}
    errors: dict[str, float] = {}
    costs: dict[str, tuple[CallCost, ...]] = {}  # of the units that methods treat: calls of each are timed once
    for name in TRIED:
        method = METHODS.load(name)
        unit = unit_text(config.unit, name, method, pipe.components[component])
        own = config.model_copy(update={"method": name})
        try:
            plan = search_component(
                pipe, component, own, method, request, weights, reporter, known_costs or costs.get(unit, ()), reference
            )
            costs[unit] = plan.costs
            errors[name] = _error(pipe, component, plan, others, wanted)
        except (ConfigError, UnsupportedError) as error:
            if name == TRIED[-1] and not found:
                raise
            reporter.notice(f"method auto: {name} was left out: {error.what}")
            continue
        found[name] = plan
        reporter.say(f"{component}: {name} has relative L2 {errors[name]:.4f}")
    best = min(errors, key=lambda name: errors[name])
    record = found[best].record
    figures = {f"relative_l2_{name}": round(error, 6) for name, error in errors.items()}
    measured = tuple(dict.fromkeys(cost for own in costs.values() for cost in own))  # both may treat one unit
    return replace(found[best], record=record.model_copy(update={"chosen": record.chosen | figures}), costs=measured)


def _error(pipe: Any, component: str, found: Found, request: RunRequest, wanted: Tensor) -> float:
    """What is typical of the relative L2 of the final latents of some runs with a plan.

    Raises:
        UnsupportedError: they are not finite.
    """
    found.install_(pipe, component)
    error = typical(relative_l2(wanted, sample(pipe, request).latents))
    remove_plans_(pipe)
    if not isfinite(error):
        raise UnsupportedError(
            "the runs with its plan are not finite.",
            "Their numbers overflow, as may happen in float16.",
            "Ask for less, or search with --device cpu, in float32.",
        )
    return error
