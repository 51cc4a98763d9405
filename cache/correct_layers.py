"""The correction of the layers that read what a plan reuses, fitted: per denoiser call and output channel the affine
map from what the quantized layer gives to what the float one gives for the same input, by least squares over samples,
guidance branches and space.

The second part of the decoupled error correction of CacheQuant: Accelerating Diffusion Models Jointly with Quantization
and Caching (2025), arXiv 2503.01323. The first part (`correct.py`) has mapped the reused value before; what is left is
the rounding of these layers.

    scale = cov(q, f) / var(q),    shift = mean(f) - scale mean(q)

q is the output of the quantized layer, f that of the float one, both with the bias b. So b counts once: of products p,
fitted without it by scale p + t, this is the very map, scale (p + b) + shift = scale p + t + b.
The paper maps the products of the reused channels only; here the whole output is mapped, with the fresh channels in it:
a layer has one product for both.
Letters: C calls, O output channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.cache_plan import COMPUTE, CachePlan, UnetCut
from ..core.reporter import Reporter
from ..runtime.cache_hooks import Values
from ..runtime.cache_units import readers_of
from ..runtime.cached import CachedUnits
from ..runtime.correction import Correction, table_name
from ..runtime.plan import plan_rows
from ..runtime.quantized_layer import QuantizedLayer
from ..runtime.request import RunRequest
from ..runtime.trajectory import DenoiserCall
from .capture import capture_batches, record
from .correct import Moments, both_hooked, tables_of


def layers_to_correct(denoiser: nn.Module, plan: CachePlan) -> tuple[str, ...]:
    """The quantized ones of the layers that read first what the unit of a plan gives back; none unless it is a cut."""
    unit = plan.units[0]
    if not isinstance(unit, UnetCut):
        return ()
    return tuple(
        path for path in readers_of(denoiser, unit) if isinstance(denoiser.get_submodule(path), QuantizedLayer)
    )


def fit_layers(
    pipe: Any,
    component: str,
    plan: CachePlan,
    tables: dict[str, Tensor],
    request: RunRequest,
    reporter: Reporter,
    reference: Any,
) -> dict[str, Tensor]:
    """The tables of the layers behind the unit of a plan, for one quantized denoiser of a pipeline without plans.

    Args:
        plan: of one unit, with the correction of what it reuses.
        tables: of that correction.
        request: the runs to profile.
        reference: the float pipeline; its runs and its layers count.

    Returns:
        `table_name` with `.scale` or `.shift` -> (C, O), 1 and 0 at calls that compute.
    """
    denoiser, floats = pipe.components[component], reference.components[component]
    unit, correction = plan.units[0].id, Correction(tables, plan)
    moments: dict[tuple[str, int], Moments] = {}
    with both_hooked(pipe, None, component, plan) as (units, _), _watched(denoiser, plan) as seen:
        rows = plan_rows(plan.codes, units.containers)
        for _, calls in capture_batches(reference, component, request, reporter, "correcting layers"):
            kept: list[Values] = []
            for call, (row, evaluations) in enumerate(zip(rows, calls, strict=True)):
                if row.actions[unit] == COMPUTE:
                    kept = record(units, evaluations) if unit in row.needed else kept
                    continue
                seen.clear()
                _reuse(units, evaluations, kept, correction, call)
                for path, entering, left in seen:
                    with torch.no_grad():
                        wanted = floats.get_submodule(path)(entering)
                    name, found = table_name(unit, path, 0), Moments.of(left, wanted)
                    moments[name, call] = moments[name, call] + found if (name, call) in moments else found
    return tables_of(moments, plan.calls)


def _reuse(
    units: CachedUnits, evaluations: list[DenoiserCall], kept: list[Values], correction: Correction, call: int
) -> None:
    """Evaluate a call with the corrected values of an earlier one."""
    for evaluation, own in zip(evaluations, kept, strict=False):  # guidance may end before the run does
        given = {
            (unit, path): correction.apply(unit, path, call, value) if path in units.layouts[unit].kept else value
            for (unit, path), value in own.items()
        }
        with units.reusing(given, units.names):
            evaluation.replay(units.denoiser)


@contextmanager
def _watched(denoiser: nn.Module, plan: CachePlan) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """Name, input and output of every evaluation of the layers."""
    seen: list[tuple[str, Tensor, Tensor]] = []

    def watch(path: str) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            seen.append((path, args[0], output))

        return denoiser.get_submodule(path).register_forward_hook(note)

    handles = [watch(path) for path in layers_to_correct(denoiser, plan)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
