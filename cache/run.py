"""The heavy part of `dacc search-cache`: all denoisers of one loaded pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core.manifest import Effect
from ..core.output import OutputWriter
from ..core.pipeline import denoisers
from ..core.reporter import Reporter
from ..core.seeds import seed_stream
from ..core.source import zoo_entry_of
from ..runtime.installed import remove_plans_
from ..runtime.request import RunRequest, tell_of_prompts
from .api import Job
from .auto import search_auto
from .config import AUTO, wants_reference
from .evolution import Keeper, evolve_component
from .files import parse_costs
from .floats import FloatReference
from .given import import_component
from .measuring import check_promise, measure_plan, measure_speedup
from .search import Found, search_component


@dataclass(frozen=True)
class Result:
    """What was found, and what it does."""

    found: dict[str, Found]
    effect: Effect
    speedup: float | None  # None: not measured


def search_all(pipe: Any, job: Job, journal: OutputWriter, reporter: Reporter) -> Result:
    """Search for each denoiser with the others computing everything, then measure all plans together.

    Raises:
        DaccError: see `search_component`; or the speed-up that was asked for is not reached.
    """
    config, request = job.config, request_of(job)
    tell_of_prompts(pipe, request, reporter)
    methods = config.methods()
    method, wanted = methods[-1], any(wants_reference(own, config) for own in methods)
    floats = FloatReference(job, pipe, reporter)
    found: dict[str, Found] = {}
    for name in job.components:
        remove_plans_(pipe)
        known = parse_costs(job.costs, name)
        reference = floats.pipeline(name) if wanted else None
        weights = job.hashes[name]
        if config.method == AUTO:
            found[name] = search_auto(pipe, name, config, request, weights, reporter, known, reference)
        elif getattr(method, "UNITS", "one") == "many":
            keeper = Keeper(journal, name)
            if floats.is_quantized(name):
                reporter.notice(
                    f"{config.method} compares {name} with the quantized network itself, without its rounding errors"
                )
            found[name] = evolve_component(pipe, name, config, method, request, weights, reporter, known, keeper)
        elif getattr(method, "UNITS", "one") == "given":
            found[name] = import_component(pipe, name, config, request, weights, reporter)
        else:
            found[name] = search_component(pipe, name, config, method, request, weights, reporter, known, reference)
    for name, own in found.items():
        own.install_(pipe, name)
    if config.measure == "never":
        if config.speedup is not None:
            reporter.notice(f"whether the loop is {config.speedup:g} times as fast was not measured: --measure never")
        return Result(found, Effect(not_measured="switched off with --measure never"), None)
    try:
        speedup, seconds = measure_speedup(pipe, request, reporter, needed=config.speedup is not None)
        if config.speedup is not None and speedup is not None:
            _check_speed(pipe, job, config.speedup, speedup, reporter)
        return Result(found, measure_plan(pipe, request, seconds, config.seed, reporter), speedup)
    finally:
        remove_plans_(pipe)


def request_of(job: Job) -> RunRequest:
    """The runs by which a search looks at a pipeline."""
    config = job.config
    assert config.steps is not None
    entry = zoo_entry_of(job.source)
    negative = config.negative_prompt
    return RunRequest(
        seeds=seed_stream("search", config.seed, config.samples),
        num_inference_steps=config.steps,
        guidance_scale=config.guidance_scale,
        batch_size=config.batch_size,
        class_labels=config.class_labels,
        prompts=config.prompts or (entry.calibration_prompts or None if entry else None),
        negative_prompt=negative if isinstance(negative, str) else None,
        negative_prompts=negative if isinstance(negative, tuple) else None,
        height=config.height,
        width=config.width,
        num_frames=config.num_frames,
    ).with_zoo_defaults(entry)


def _check_speed(pipe: Any, job: Job, asked: float, measured: float, reporter: Reporter) -> None:
    """Of a pipeline whose every denoiser has a plan the promise is kept, of others the whole loop is told."""
    others = [name for name in denoisers(pipe) if name not in job.components]
    if not others:
        check_promise(asked, measured)
        return
    reporter.notice(
        f"--speedup was planned for {' and '.join(job.components)} alone: with {' and '.join(others)}, which computes "
        f"everything, the whole loop is {measured:.2f} times as fast"
    )
