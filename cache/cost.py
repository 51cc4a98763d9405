"""What it does to a run to reuse at one call what a unit gave at another one, for every pair of calls.

The joint form is for quantized networks: what the float network computes at call t stands against what the quantized
one gives with a value of call i, t = i included, where the error is of rounding alone.
Letters: C calls of a run, S samples.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..calibrate.sensitivity import interpolated
from ..core.cache_plan import COMPUTE, REUSE, CachePlan
from ..core.reporter import Reporter
from ..runtime.cache_hooks import Values
from ..runtime.cached import CachedUnits
from ..runtime.compare import relative_l2
from ..runtime.installed import remove_plans_
from ..runtime.request import RunRequest
from ..runtime.trajectory import DenoiserCall, sample
from .capture import capture_batches, record
from .correct import Pairs, both_hooked, mapped
from .window import Window

PROBES = 6  # calls at which the answer of the final sample is measured


def feature_costs(
    pipe: Any, component: str, plan: CachePlan, request: RunRequest, reporter: Reporter, reference: Any | None = None
) -> dict[str, list[list[float]]]:
    """Unit -> (C, C): at [i][t] the L1 distance of what it gives at call i to what it gives at call t (with
    `reference`: to what that of the float pipeline gives), summed over samples.

    Holds the values of one batch of samples at all calls.
    """
    total = {unit.id: torch.zeros(plan.calls, plan.calls, dtype=torch.float64) for unit in plan.units}
    with both_hooked(pipe, reference, component, plan) as (units, targets):
        for _, calls in capture_batches(reference or pipe, component, request, reporter, "profiling"):
            features = [flat_values(units, record(units, evaluations)) for evaluations in calls]
            goals = features
            if reference is not None:
                goals = [flat_values(targets, record(targets, evaluations)) for evaluations in calls]
            for unit, distances in total.items():
                for first, reused in enumerate(features):
                    for call in range(first, len(calls)):
                        wanted, given = goals[call][unit], reused[unit]
                        shared = min(len(wanted), len(given))  # guidance may end before the run does
                        distances[first, call] += (wanted[:shared] - given[:shared]).abs().sum(dtype=torch.float64)
    return {unit: distances.tolist() for unit, distances in total.items()}


def output_cost(
    pipe: Any,
    component: str,
    plan: CachePlan,
    window: Window,
    request: RunRequest,
    reporter: Reporter,
    *,
    longest: int,
    reference: Any | None = None,
    pairs: Pairs | None = None,
) -> list[list[float]]:
    """(C, C): at [i][t] the error of the denoiser's output at call t with what the unit gave at call i (root mean
    square) times the `sensitivity` of the final sample to it. Infinite for t - i >= `longest`.

    Every evaluation has the input of the run that computes everything.

    Args:
        reference: the float pipeline, whose runs and outputs then count.
        pairs: takes in the moments of all pairs of calls; reused values are then corrected. Holds the values of a batch
            at all calls.
    """
    (unit,) = (unit.id for unit in plan.units)
    total = torch.zeros(plan.calls, plan.calls, dtype=torch.float64)
    before = torch.zeros(plan.calls, dtype=torch.float64)  # of reusing the call before, to the network itself
    with both_hooked(pipe, reference, component, plan) as (units, targets):
        for share, calls in capture_batches(reference or pipe, component, request, reporter, "capturing"):
            outputs = [_outputs(units, evaluations) for evaluations in calls]
            goals = outputs if reference is None else [_outputs(targets, evaluations) for evaluations in calls]
            wanted = [record(targets, evaluations) for evaluations in calls] if pairs else None
            for first in reporter.progress(range(plan.calls), "profiling"):
                kept = record(units, calls[first])
                total[first, first] += share * _distance(outputs[first], goals[first])
                for call in range(first + 1, plan.calls):
                    found = pairs.add(units, unit, (first, call), kept, wanted[call]) if pairs and wanted else None
                    if call < first + longest:
                        given = mapped(kept, found) if found else kept
                        total[first, call] += share * _distance(_reusing(units, calls[call], given), goals[call])
                if first + 1 < plan.calls:
                    plain = _reusing(units, calls[first + 1], kept)
                    before[first + 1] += share * _distance(plain, outputs[first + 1])
    weights = sensitivity(pipe, component, plan, window, request, before.tolist(), reporter)
    for first in range(plan.calls):
        total[first, first + longest :] = float("inf")
    weighted: list[list[float]] = (total * torch.tensor(weights, dtype=torch.float64)).tolist()
    return weighted


def sensitivity(
    pipe: Any,
    component: str,
    plan: CachePlan,
    window: Window,
    request: RunRequest,
    errors: list[float],
    reporter: Reporter,
) -> list[float]:
    """(C,): how far the final sample moves for an error of the output at each call, relative L2 over root mean square.

    Runs that reuse at one call only tell it for some calls; between them its logarithm is interpolated.

    Args:
        plan: for its unit and grid; its codes do not matter.
        errors: (C,) of the output at each call when it reuses the call before.
    """
    calls = plan.calls
    probes = sorted({1 + round(number * (calls - 2) / (PROBES - 1)) for number in range(PROBES)})
    reference = sample(pipe, request).latents
    found: dict[int, float] = {}
    for probe in reporter.progress(probes, "probing"):
        codes = "".join(REUSE if call == probe else COMPUTE for call in range(calls))
        window.install_(pipe, component, plan.model_copy(update={"codes": dict.fromkeys(plan.codes, codes)}))
        moved = relative_l2(reference, sample(pipe, request).latents).mean().item()
        if moved > 0 and errors[probe] > 0:
            found[probe] = moved / errors[probe]
    remove_plans_(pipe)
    return interpolated(found, calls)


def _outputs(units: CachedUnits, evaluations: list[DenoiserCall]) -> list[Tensor]:
    """What a denoiser gives at one call, for each evaluation."""
    return [call.replay(units.denoiser)[0] for call in evaluations]


def _reusing(units: CachedUnits, evaluations: list[DenoiserCall], kept: list[Values]) -> list[Tensor]:
    """The same with the values of another call; fewer where guidance ended before the run does."""
    found = []
    for call, values in zip(evaluations, kept, strict=False):
        with units.reusing(values, units.names):
            found.append(call.replay(units.denoiser)[0])
    return found


def _distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Root mean square, all guidance branches together."""
    squares = [(one - other).double().pow(2).mean().item() for one, other in zip(found, wanted, strict=False)]
    return math.sqrt(sum(squares))


def errors_of_reuse(units: CachedUnits, calls: list[list[DenoiserCall]], kept: list[list[Values]]) -> list[float]:
    """(C,): error of the output (root mean square) at each call with what the units gave at the call before; 0 first.

    Args:
        kept: (C,) what they give at each call.
    """
    found = [0.0]
    for evaluations, before in zip(calls[1:], kept, strict=False):
        found.append(_distance(_reusing(units, evaluations, before), _outputs(units, evaluations)))
    return found


def flat_values(units: CachedUnits, recorded: list[Values]) -> dict[str, Tensor]:
    """What each unit keeps at one call, all guidance branches in one row, on the CPU."""
    return {
        unit: torch.cat(
            [
                leaf.flatten().float().cpu()
                for values in recorded
                for path in sorted(layout.kept)
                for leaf in tree_leaves(values[unit, path])
                if torch.is_tensor(leaf)
            ]
        )
        for unit, layout in units.layouts.items()
    }
