"""Where the hooks of cached units stand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch import nn

from ..core.cache_plan import BlockRange, CachePlan
from .block_streams import block_metadata
from .cache_hooks import BlockHook, LayerHook, SkipHook
from .cache_units import WHOLE, Layout, checked_path
from .gate import GateHook, probe_of
from .plan import Containers

HOOK: Final = "dacc_cache"  # names of hooks begin so


def hook_units_(
    owner: object,
    denoiser: nn.Module,
    layouts: Mapping[str, Layout],
    containers: Containers,
    plan: CachePlan | None,
) -> None:
    """Register a hook before every module that a unit skips, a gate looks at or a plan corrects: those of outer units
    last, so that they stand outside.

    Args:
        owner: the runner whose frames count.
        plan: for its gates and the layers that it corrects.

    Raises:
        ModelError: the denoiser has no such layer.
    """
    modules = dict(denoiser.named_modules())
    inner_first = sorted(layouts.values(), key=lambda layout: -len(containers[layout.unit.id]))
    skipping: dict[str, dict[str, bool]] = {}
    for layout in inner_first:
        for path in () if isinstance(layout.unit, BlockRange) else layout.skipped:
            skipping.setdefault(path, {})[layout.unit.id] = path in layout.kept
    for path, units in skipping.items():  # before the ranges: a unit of modules may lie in one, no range in such a unit
        name = f"{HOOK}.output" if path == WHOLE else HOOK  # the hook that opens frames stands before it there
        _register(modules[path], SkipHook(owner, path, units), name)
    for layout in inner_first:
        if not isinstance(layout.unit, BlockRange):
            continue
        for path in layout.skipped:
            first, last = path == layout.skipped[0], path == layout.skipped[-1]
            hook = BlockHook(owner, layout.unit, path, block_metadata(modules[path]), first=first, last=last)
            _register(modules[path], hook, f"{HOOK}.{layout.unit.id}")
    if plan is None:
        return
    name = plan.units[0].id
    for path in plan.correction.layers if plan.correction else ():
        _register(modules[checked_path(denoiser, path, name)], LayerHook(owner, name, path), HOOK)
    for name, gate in plan.gates.items():
        probe = probe_of(layouts[name], denoiser)
        watch = GateHook(owner, name, gate, probe, block_metadata(modules[probe]))
        _register(modules[probe], watch, f"{HOOK}.gate")


def _register(module: nn.Module, hook: ModelHook, name: str) -> None:
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)
