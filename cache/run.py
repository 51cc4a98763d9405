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
from .config import AUTO, METHODS, TRIED
from .evolution import Keeper, evolve_component
from .files import parse_costs
from .floats import FloatReference, wants_reference
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
    config = job.config
    assert config.steps is not None
    entry = zoo_entry_of(job.source)
    request = RunRequest(
        seeds=seed_stream("search", config.seed, config.samples),
        num_inference_steps=config.steps,
        guidance_scale=config.guidance_scale,
        batch_size=config.batch_size,
        class_labels=config.class_labels,
        prompts=config.prompts or (entry.calibration_prompts or None if entry else None),
        negative_prompt=config.negative_prompt,
        height=config.height,
        width=config.width,
        num_frames=config.num_frames,
    ).with_zoo_defaults(entry)
    tell_of_prompts(pipe, request, reporter)
    methods = [METHODS.load(name) for name in (TRIED if config.method == AUTO else (config.method,))]
    method = methods[-1]
    wanted = any(wants_reference(own, config) for own in methods)
    floats = FloatReference(job, pipe, reporter) if wanted else None
    found: dict[str, Found] = {}
    for name in job.components:
        remove_plans_(pipe)
        known = parse_costs(job.costs, name)
        reference = floats.pipeline(name) if floats else None
        weights = job.hashes[name]
        if config.method == AUTO:
            found[name] = search_auto(pipe, name, config, request, weights, reporter, known, reference)
        elif getattr(method, "UNITS", "one") == "many":
            keeper = Keeper(journal, name)
            found[name] = evolve_component(pipe, name, config, method, request, weights, reporter, known, keeper)
        elif getattr(method, "UNITS", "one") == "given":
            found[name] = import_component(pipe, name, config, request, weights, reporter)
        else:
            found[name] = search_component(pipe, name, config, method, request, weights, reporter, known, reference)
    for name, own in found.items():
        own.install_(pipe, name)
    if config.measure == "never":
        return Result(found, Effect(not_measured="switched off with --measure never"), None)
    try:
        speedup, seconds = measure_speedup(pipe, request, reporter)
        others = [name for name in denoisers(pipe) if name not in job.components]
        if config.speedup is not None and others:
            reporter.notice(
                f"--speedup was planned for {' and '.join(job.components)} alone: with {' and '.join(others)}, which "
                f"computes everything, the whole loop is {speedup:.2f} times as fast"
            )
        elif config.speedup is not None:
            check_promise(config.speedup, speedup)
        return Result(found, measure_plan(pipe, request, seconds, config.seed, reporter), speedup)
    finally:
        remove_plans_(pipe)
