"""Put cache plans into a pipeline, take them out, and run without them for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..core.cache_plan import CachePlan
from ..core.pipeline import denoisers
from .cached import OFF, CachedUnits, RootHook
from .clockwork import attach_clock
from .correction import Correction
from .ending import ending_its_run
from .hooking import HOOK
from .plan import check_model


def install_plan_(pipe: Any, component: str, plan: CachePlan, correction: Correction | None = None) -> CachedUnits:
    """Let a denoiser of a pipeline run with a plan, in place of an earlier one.

    Args:
        correction: of a plan that has one; without it the plan reuses values as they are.

    Raises:
        ModelError: the plan was made for another model.
        UnsupportedError: this denoiser cannot be cached in this way.
    """
    denoiser = pipe.components[component]
    check_model(plan, component, denoiser)
    if (old := installed_units(denoiser)) is not None:
        old.remove_()
    attach_clock(pipe)  # first: it counts the call before our hook asks for it
    units = CachedUnits(denoiser, plan.units, plan, correction)
    if not hasattr(type(pipe), "_dacc_cached"):
        pipe.__class__ = ending_its_run(type(pipe))  # type: ignore[arg-type]
    return units


def remove_plans_(pipe: Any) -> None:
    """Let all denoisers of a pipeline run as they did before a plan was installed."""
    for denoiser in denoisers(pipe).values():
        if (units := installed_units(denoiser)) is not None:
            units.remove_()
    if hasattr(type(pipe), "_dacc_cached"):
        pipe.__class__ = type(pipe).__mro__[1]


def installed_units(denoiser: nn.Module) -> CachedUnits | None:
    """The units that a denoiser is hooked for; None where it is not."""
    registry = getattr(denoiser, "_diffusers_hook", None)
    hook = registry.get_hook(HOOK) if registry else None
    return hook.owner if isinstance(hook, RootHook) else None


@contextmanager
def no_cache(pipe: Any) -> Iterator[None]:
    """Run a pipeline without its cache plans, in this thread: `with dacc.no_cache(pipe): pipe(...)`."""
    units = [installed_units(denoiser) for denoiser in denoisers(pipe).values()]
    token = OFF.set(OFF.get() | {id(found) for found in units if found is not None})
    try:
        yield
    finally:
        OFF.reset(token)
