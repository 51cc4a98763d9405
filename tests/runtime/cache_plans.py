"""Plans written by hand for the tests of the runner."""

from __future__ import annotations

from typing import Any

from dacc.core.cache_plan import (
    BlockRange,
    CachePlan,
    DenoiserOutput,
    ModuleUnit,
    UnetBody,
    UnetCut,
    UnetEncoder,
    Unit,
    UnitMacs,
)
from dacc.core.schedule_id import schedule_id
from dacc.runtime.plan import denoiser_sha256

CUT = UnetCut(id="deep", block=0, layer=0)
ENCODER = UnetEncoder(id="encoder")
BODY = UnetBody(id="body")
OUTPUT = DenoiserOutput(id="output")


def module(path: str) -> ModuleUnit:
    return ModuleUnit(id=path, path=path)


def blocks(first: int, end: int, *stacks: str, store: str = "residual") -> BlockRange:
    return BlockRange(id="body", stacks=stacks or ("transformer_blocks",), first=first, end=end, store=store)


def denoiser_of(pipe: Any) -> tuple[str, Any]:
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    return name, getattr(pipe, name)


def plan_for(pipe: Any, codes: dict[Unit, str] | Any, **fields: Any) -> CachePlan:
    """A plan for the grid that the scheduler of a pipeline makes for as many steps as there are codes."""
    codes = dict(codes)
    steps = len(next(iter(codes.values())))
    grid = fields.pop("grid", None) or grid_of(pipe, steps)
    _, denoiser = denoiser_of(pipe)
    return CachePlan(
        **{
            "class_name": type(denoiser).__name__,
            "config_sha256": denoiser_sha256(denoiser),
            "weights": "0" * 64,
            "schedule": grid,
            "units": tuple(codes),
            "codes": {unit.id: own for unit, own in codes.items()},
            "macs": UnitMacs(full=10, units={unit.id: 6 for unit in codes}),
            **fields,
        }
    )


def grid_of(pipe: Any, steps: int) -> Any:
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    if scheduler.config.get("use_dynamic_shifting"):
        scheduler.set_timesteps(steps, mu=1.0)
    else:
        scheduler.set_timesteps(steps)
    return schedule_id(scheduler)
