"""`dacc calibrate` from request to calibration set: prepare, run, write.

Everything that needs no weights happens first and without importing torch, so that a wrong option or a set that already
exists is answered at once.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.calibration import (
    CALIBRATION_NAME,
    FORMAT,
    CalibrationRecord,
    SampleRecord,
    ShardRecord,
    existing_set,
    read_calibration,
)
from ..core.errors import ConfigError
from ..core.machine import arithmetic_of, describe_machine
from ..core.manifest import ComponentRecord, SourceRecord, read_manifest
from ..core.output import check_output, chosen_output
from ..core.pipeline import denoiser_names, pipeline_class, select_components
from ..core.reporter import Reporter, silent
from ..core.safe_read import combined_hash, file_sha256, weight_hash
from ..core.source import PIPELINE_INDEX, Source, component_entries, resolve_source, zoo_entry_of
from .config import STRATEGIES, CalibrateConfig
from .picture_folder import PictureFolder, read_folder

if TYPE_CHECKING:
    from .collect import Collected
    from .store import SetWriter


@dataclass(frozen=True)
class Job:
    """Everything that is decided before the first weight is read."""

    source: Source
    config: CalibrateConfig  # with its defaults filled in
    components: list[str]
    weights: dict[str, str]  # component -> weight hash
    request: str  # names what was asked for
    pictures: PictureFolder | None = None  # in place of what runs would draw


def calibrate_pipeline(
    source: str | Path | Source | None,
    config: CalibrateConfig | None = None,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = True,
    device: str = "auto",
    dtype: str = "float32",
    reporter: Reporter | None = None,
) -> Path:
    """Run a pipeline with its own scheduler and guidance and keep what enters its denoisers.

    Args:
        source: a pipeline folder, bundle, Hub id or `zoo:NAME`; None is the embedded default.
        config: how much to run and what to keep.
        output: the folder to make; default `./<source>-calibration`.
        overwrite: replace an existing folder (only when the new one is complete).
        resume: take over the batches that an interrupted run of the same request had finished.
        device: where the pipeline runs.
        dtype: of the run; float32, auto (see `dacc.load`), bfloat16 or float16.

    Returns:
        The set's folder. If it already holds the answer to this very request it is returned at once.

    Raises:
        DaccError: see its subclasses; nothing of the user's is touched then.
    """
    config, reporter, started = config or CalibrateConfig(), reporter or silent(), time.time()
    earlier = len(reporter.notices)  # a reporter may have served another command before
    job = prepare(source, config, dtype, reporter)
    target = chosen_output(output, f"{job.source.name}-calibration")
    if not overwrite and existing_set(target, job.request):
        _refuse_damaged(target)
        reporter.say(f"{target} already holds this set; nothing to do")
        return target
    check_output(job.source.path, target, overwrite=overwrite)

    from ..runtime.load import load_source
    from .collect import collect
    from .pictures import check_pictures
    from .store import SetWriter

    pipe: Any = load_source(job.source, device=device, dtype=dtype, cached=False, reporter=reporter)
    files = job.pictures.files if job.pictures else ()
    if job.pictures:
        check_pictures(pipe, captions=bool(job.pictures.captions))
    with SetWriter(
        job.source.path,
        target,
        run_key=job.request,
        reporter=reporter,
        arithmetic=arithmetic_of(pipe.device),
        overwrite=overwrite,
        resume=resume,
    ) as writer:
        collected = collect(pipe, job.config, job.components, writer, reporter, files)
        writer.commit(
            [batch.name for batch in collected.batches],
            lambda shards: _record(job, pipe, collected, writer, shards, reporter.notices[earlier:]),
            {
                "command": "calibrate",
                "seconds": round(time.time() - started, 1),
                "source_path": str(job.source.path),
                "device": str(pipe.device),
                **describe_machine(),
            },
        )
    _summarize(target, time.time() - started, reporter)
    return target


def prepare(source: str | Path | Source | None, config: CalibrateConfig, dtype: str, reporter: Reporter) -> Job:
    """Resolve names and check everything that can be checked without reading weights.

    Raises:
        DaccError: unknown strategy, field or component, or no pipeline.
    """
    STRATEGIES.check(config.strategy)
    config.strategy_config()
    found = source if isinstance(source, Source) else resolve_source(_text(source), reporter=reporter)
    components = select_components(found.path, list(config.component))
    known = denoiser_names(found.path)
    if others := [name for name in components if name not in known]:
        raise ConfigError(f"{others[0]} is not called at every step.", mend=f"Choose from {', '.join(known)}.")
    if any(record.quantization for record in _treated(found).values()):
        reporter.notice(f"{found.name} is quantized: the inputs of its float source differ a little from these")
    pictures = read_folder(config.images) if config.images else None
    if pictures and pictures.captions and config.prompts is None:
        config = config.model_copy(update={"prompts": pictures.captions})
    config = config.resolved(zoo_entry_of(found))
    weights = {name: weight_hash(found.path / name) for name in _weighty(found)}
    asked = {
        "format": FORMAT,
        "weights": weights,
        "settings": combined_hash(_settings_files(found)),
        "config": config.model_dump(mode="json", exclude={"images"}),
        "components": components,
        "dtype": dtype,
    }
    if pictures:
        asked["images"] = pictures.sha256
    return Job(found, config, components, weights, _hash(asked), pictures)


def _refuse_damaged(folder: Path) -> None:
    """Sizes alone do not tell that a set is what it was.

    Raises:
        ConfigError: the record or a file has another content.
    """
    record = read_calibration(folder)
    assert record is not None
    changed = [shard.file for shard in record.shards if file_sha256(folder / shard.file) != shard.sha256]
    changed += [CALIBRATION_NAME] * (record.id != record.identity())
    if changed:
        raise ConfigError(
            f"the output {folder} is this very set, but damaged: {changed[0]} is not what its record says.",
            mend="Give --overwrite to make it anew, or choose another --output.",
        )


def _record(
    job: Job,
    pipe: Any,
    collected: Collected,
    writer: SetWriter,
    shards: tuple[ShardRecord, ...],
    notices: list[str],
) -> CalibrationRecord:
    """The record of the set; its id is filled in when it is written."""
    branches: dict[str, Counter[str]] = {}
    for batch in collected.batches:
        for entry in writer.unit_record(batch.name)["records"]:
            branches.setdefault(entry["component"], Counter())[entry["state"]["branch"] or "none"] += 1
    samples = _samples(pipe, collected)
    dealt = {"prompts", "negative_prompt", "class_labels"}  # to be found with the samples
    recipe = job.config.model_dump(mode="json", exclude={*dealt, "budget_gb", "component", "images"})
    if job.pictures:
        recipe["images"] = {"count": len(job.pictures.files), "sha256": job.pictures.sha256}
    dtype = str(pipe.components[job.components[0]].dtype)
    facts = {"samples": len(samples), "components": job.components, "dtype": dtype.removeprefix("torch.")}
    return CalibrationRecord(
        id="",
        request=job.request,
        source=SourceRecord(name=job.source.identity, revision=job.source.revision, weights=job.weights),
        pipeline=pipeline_class(job.source.path),
        recipe=recipe | facts,
        schedule=collected.schedule,
        samples=samples,
        branches=branches,
        shards=shards,
        notices=tuple(notices),
    )


def _samples(pipe: Any, collected: Collected) -> tuple[SampleRecord, ...]:
    """What each picture was made from, as the pipeline was told."""
    from ..runtime.request import call_arguments

    seeds = collected.request.seeds
    told = call_arguments(pipe, collected.request, range(len(seeds)))
    names = {"prompt": "prompt", "negative_prompt": "negative_prompt", "class_label": "class_labels"}
    given = {field: told[name] for field, name in names.items() if name in told}
    return tuple(
        SampleRecord(seed=seed, **{field: values[position] for field, values in given.items()})
        for position, seed in enumerate(seeds)
    )


def _weighty(source: Source) -> list[str]:
    """Components that have weights."""
    return [name for name in component_entries(source.path) if any((source.path / name).glob("*.safetensors"))]


def _settings_files(source: Source) -> dict[str, str]:
    """Hashes of the small files: configs of models and scheduler, tokenizers."""
    small = [PIPELINE_INDEX, *(f"{name}/*" for name in component_entries(source.path))]
    files = [file for pattern in small for file in sorted(source.path.glob(pattern)) if file.is_file()]
    return {
        str(file.relative_to(source.path)): file_sha256(file)
        for file in files
        if file.suffix in (".json", ".txt", ".model", ".jinja")
    }


def _treated(source: Source) -> dict[str, ComponentRecord]:
    manifest = read_manifest(source.path)
    return manifest.components if manifest else {}


def _summarize(target: Path, seconds: float, reporter: Reporter) -> None:
    """The closing line on stderr."""
    record = read_calibration(target)
    assert record is not None
    calls = {call for shard in record.shards for call in shard.calls}
    evaluations = sum(count for shard in record.shards for count in shard.records.values())
    size = sum(shard.size for shard in record.shards)
    reporter.say(
        f"{evaluations} records of {len(record.samples)} samples at {len(calls)} of {len(record.schedule.timesteps)} "
        f"calls: {size / 1e6:.2f} MB in {seconds:.1f} s"
    )


def _text(source: str | Path | None) -> str | None:
    return None if source is None else str(source)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
