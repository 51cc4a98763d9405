"""Evaluate pipelines side by side: the same noise through each, then quality, size, memory and speed.

reference ─┐
source 1  ─┼─ sample ── metrics ── sizes ── time in turns ── memory, one process each ── report
source 2  ─┘
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from ..core.errors import ConfigError, ModelError, ResourceError
from ..core.manifest import read_manifest
from ..core.reference import find_reference
from ..core.reporter import Reporter, silent
from ..core.schedule_id import schedule_id
from ..core.seeds import seed_stream
from ..core.source import Source, resolve_source, zoo_entry_of
from ..runtime.compare import Samples
from ..runtime.load import load_source
from ..runtime.request import RunRequest
from ..runtime.trajectory import sample
from .config import EvaluateConfig
from .grid import write_grid
from .memory import measure_memory
from .quality import find_judge, measure_quality, metric_names
from .report import PICTURE_NAME, row_label, write_json
from .result import Evaluation, Memory, Settings, SourceReport, Speed
from .size import component_sizes, treated_components
from .timing import measure_speed

DEFAULT_STEPS = 20
SourceLike = Source | str | Path


@dataclass(frozen=True)
class Subject:
    """One source while it is evaluated."""

    source: Source
    pipe: Any
    samples: Samples
    is_reference: bool


def evaluate_pipelines(
    sources: SourceLike | Sequence[SourceLike],
    *,
    reference: SourceLike | None = None,
    config: EvaluateConfig | None = None,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Measure sources against a reference, all from the same noise.

    Args:
        sources: what to evaluate, one or several; may be empty when a reference is given.
        reference: what they should equal. None: the zoo pipeline that the first source was made from; a first source
            that was not made from another is the reference itself.

    Raises:
        ModelError: a source is missing or not a pipeline, or does not make what the reference makes.
        ConfigError: an unknown metric, an option that the pipeline does not have, or no reference to be found.
    """
    config, reporter = config or EvaluateConfig(), reporter or silent()
    chosen = metric_names(config.metrics)
    given = [sources] if isinstance(sources, (str, Path, Source)) else sources
    found = _order([_resolve(source, reporter) for source in given], reference, reporter)
    entry = next((entry for entry in map(zoo_entry_of, found) if entry), None)
    request = RunRequest(
        seeds=seed_stream("evaluation", config.seed, config.num),
        num_inference_steps=config.steps or (entry.num_inference_steps if entry else DEFAULT_STEPS),
        guidance_scale=config.guidance_scale,
        class_labels=config.labels,
        prompts=config.prompts,
        negative_prompt=config.negative_prompt,
        height=config.height,
        width=config.width,
        num_frames=config.num_frames,
        batch_size=config.batch_size,
    ).with_zoo_defaults(entry)
    absent: list[str] = []

    subjects = list(_run(found, request, config, reporter))
    judge = find_judge(entry, chosen, subjects[0].samples, absent)
    results = measure_quality(
        [subject.samples for subject in subjects],
        request,
        judge,
        chosen,
        expected=config.metrics or ("frechet",),  # the others that were not asked for come where they apply
        absent=absent,
    )
    speeds = _time(subjects, request, config, absent, reporter)
    memories = [_measure_memory(subject, request, config, absent, reporter) for subject in subjects]
    treated = [name for subject in subjects for name in treated_components(subject.source.path)]
    reports = tuple(
        SourceReport(
            name=subject.source.name,
            identity=subject.source.identity,
            is_reference=subject.is_reference,
            pipeline=type(subject.pipe).__name__,
            metrics=result,
            components=component_sizes(subject.pipe, subject.source.path, treated),
            speed=speed,
            memory=memory,
        )
        for subject, result, speed, memory in zip(subjects, results, speeds, memories, strict=True)
    )
    evaluation = Evaluation(
        settings=_settings(subjects[0].pipe, request, config),
        sources=reports,
        judge=judge.name if judge else None,
        judge_fid_between_halves=judge.facts.get("fid_between_halves") if judge else None,
        absent=tuple(dict.fromkeys(absent)),
    )
    return evaluation if config.output is None else _write(evaluation, subjects, config.output, config.grid_images)


def default_reference(source: Source, reporter: Reporter) -> Source | None:
    """The pipeline that a bundle was made from; None for other sources.

    Raises:
        ConfigError: a bundle whose source cannot be found without help.
    """
    manifest = read_manifest(source.path)
    if manifest is None:
        return None
    if origin := find_reference(source, reporter):
        return origin
    raise ConfigError(
        f"{source.name} was made from {manifest.source.name}, which dacc cannot find again by itself.",
        mend="Give --reference SOURCE.",
    )


def _resolve(source: SourceLike, reporter: Reporter) -> Source:
    return source if isinstance(source, Source) else resolve_source(str(source), reporter=reporter)


def _order(sources: list[Source], reference: SourceLike | None, reporter: Reporter) -> list[Source]:
    """The reference first, every folder once."""
    if reference is not None:
        first = _resolve(reference, reporter)
    elif sources:
        first = default_reference(sources[0], reporter) or sources[0]
        reporter.say(f"reference: {first.identity}")
    else:
        raise ConfigError("there is nothing to evaluate.", mend="Give a SOURCE, or --reference SOURCE.")
    return [first, *(source for source in sources if source.path != first.path)]


def _run(
    sources: Sequence[Source], request: RunRequest, config: EvaluateConfig, reporter: Reporter
) -> Iterable[Subject]:
    """Load and sample every source, the reference first."""
    expected: torch.Size | None = None
    for source in sources:
        reporter.say(f"sampling {source.name}: {len(request.seeds)} images, {request.num_inference_steps} steps")
        with reporter.stage(f"sample {source.name}"):
            pipe: Any = load_source(
                source, device=config.device, dtype=config.dtype, prefer=config.prefer, reporter=reporter
            )
            samples = sample(pipe, request, reporter=reporter)
        _check_samples(source, samples, expected)
        yield Subject(source, pipe, samples, is_reference=expected is None)
        expected = samples.images.shape


def _check_samples(source: Source, samples: Samples, expected: torch.Size | None) -> None:
    if expected is not None and samples.images.shape != expected:
        raise ModelError(
            f"{source.name} makes images of shape {tuple(samples.images.shape)}, the reference {tuple(expected)}.",
            mend="Evaluate pipelines of one family together.",
        )
    if not torch.isfinite(samples.images).all() or not torch.isfinite(samples.latents).all():
        raise ModelError(f"{source.name} makes images with NaN or infinity.", mend="Try --dtype float32.")


def _time(
    subjects: list[Subject], request: RunRequest, config: EvaluateConfig, absent: list[str], reporter: Reporter
) -> list[Speed] | list[None]:
    if not config.speed:
        absent.append("speed: switched off.")
        return [None] * len(subjects)
    count = config.speed_batch_size
    timed = request.model_copy(update={"seeds": seed_stream("evaluation", config.seed, count), "batch_size": count})
    pipes = [subject.pipe for subject in subjects]
    return measure_speed(pipes, timed, repeats=config.speed_repeats, reporter=reporter)


def _measure_memory(
    subject: Subject, request: RunRequest, config: EvaluateConfig, absent: list[str], reporter: Reporter
) -> Memory | None:
    if not config.memory:
        absent.append("peak memory: switched off.")
        return None
    name = subject.source.name
    needed = sum(file.stat().st_size for file in subject.source.path.rglob("*.safetensors"))
    if needed > psutil.virtual_memory().available:
        absent.append(f"peak memory of {name}: not enough memory is free to load it a second time.")
        return None
    try:
        with reporter.stage(f"memory of {name}"):
            return measure_memory(
                subject.source.path,
                request.model_dump(mode="json"),
                device=config.device,
                dtype=config.dtype,
                prefer=config.prefer,
                threads=torch.get_num_threads(),
            )
    except ResourceError as error:
        absent.append(f"peak memory of {name}: {error}")
        return None


def _settings(pipe: Any, request: RunRequest, config: EvaluateConfig) -> Settings:
    return Settings(
        num=len(request.seeds),
        steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        labels=request.class_labels,
        prompts=request.prompts and request.prompts[: len(request.seeds)],  # a zoo pipeline has hundreds
        negative_prompt=request.negative_prompt,
        height=request.height,
        width=request.width,
        num_frames=request.num_frames,
        seed=config.seed,
        batch_size=request.batch_size,
        scheduler=type(pipe.scheduler).__name__,
        schedule_id=schedule_id(pipe.scheduler).short,
        device=str(pipe.device),
        dtype=str(pipe.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )


def _write(evaluation: Evaluation, subjects: list[Subject], folder: Path, columns: int) -> Evaluation:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        (*row_label(report), subject.samples.images[:columns])
        for report, subject in zip(evaluation.sources, subjects, strict=True)
    ]
    write_grid(rows, folder / PICTURE_NAME)
    evaluation = evaluation.model_copy(update={"files": ("evaluation.json", PICTURE_NAME)})
    write_json(evaluation, folder)
    return evaluation
