"""`dacc search-cache` from request to bundle: prepare, search for each denoiser, measure, write.

Everything that needs no weights happens first and without importing torch, so that a wrong option or a result that
already exists is answered at once.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.bundle import BundleWriter, component_weight_bytes, component_weight_hash, existing_bundle
from ..core.cache_plan import CORRECTION_NAME, beside_plan
from ..core.calibration import calibration_record
from ..core.card import model_card
from ..core.identity import source_identity
from ..core.machine import arithmetic_of, describe_machine
from ..core.manifest import (
    ComponentRecord,
    Effect,
    FileRecord,
    Manifest,
    PassRecord,
    SourceRecord,
    read_manifest,
)
from ..core.output import check_output, chosen_output
from ..core.pipeline import pipeline_class, select_components
from ..core.reference import find_reference, given_reference
from ..core.reporter import Reporter, silent
from ..core.requirements import parse_requirements
from ..core.safe_read import component_tensors, weight_hash
from ..core.source import Source, component_entries, resolve_source, zoo_entry_of
from .config import DEFAULT_STEPS, GIVEN, SearchCacheConfig, wants_reference
from .files import given_schedule, like_calibration, read_costs, told_config

if TYPE_CHECKING:
    from .search import Found

TOLD_UNITS = 3


@dataclass(frozen=True)
class Job:
    """Everything that is decided before the first weight is read."""

    source: Source
    config: SearchCacheConfig  # resolved, with the steps filled in
    components: list[str]
    hashes: dict[str, str]  # component -> weight hash
    costs: dict[str, Any]  # component -> call times of an earlier search
    reference: Source | None  # the float pipeline of a quantized source, where it is on this machine
    calibration: Path | None  # the set whose runs the search makes its own like
    calibration_id: str | None
    run_key: str  # names this very result


def search_cache(
    source: str | Path | Source | None,
    config: SearchCacheConfig | None = None,
    *,
    calib: str | Path | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = True,
    device: str = "auto",
    cost_profile: str | Path | None = None,
    reference: str | Path | Source | None = None,
    require: tuple[str, ...] = (),
    keep_failed: bool = False,
    reporter: Reporter | None = None,
) -> Path:
    """Find a cache plan for the denoisers of a pipeline and write a bundle that carries it.

    Args:
        source: a pipeline folder, bundle, Hub id or `zoo:NAME`; None is the embedded default.
        config: what to search for; the default is the best plan for twice the speed.
        calib: a calibration set: what the config leaves open (prompts, classes, guidance, steps, size) is as in its
            runs; None: the one that `source` names, if it names one.
        output: the folder to make; default `./<source>-cached-<target>-<method>`.
        overwrite: replace an existing folder (only when the new one is complete).
        resume: go on from the last generation of an interrupted run of the same config, for `evolve`.
        device: where the pipeline runs and is timed.
        cost_profile: `dacc_run.json` of an earlier result; its call times are taken in place of measuring.
        reference: the float pipeline that a quantized source was made from; None: found by what its manifest says.
        require: floors such as "psnr>=25"; when one is missed nothing is put in place.
        keep_failed: keep what missed a floor as `<output>.failed`.

    Returns:
        The bundle's folder. If it already holds this very result it is returned at once.

    Raises:
        DaccError: see its subclasses; nothing of the user's is touched then.
    """
    config, reporter, started = config or SearchCacheConfig(), reporter or silent(), time.time()
    earlier = len(reporter.notices)  # a reporter may have served another pass before
    requirements = parse_requirements(require, "search-cache", measure=config.measure)
    job = prepare(source, config, reporter, cost_profile, reference, calib)
    target = chosen_output(output, default_output(job))
    if not overwrite and existing_bundle(target, job.run_key):
        return requirements.accept(target, reporter)
    check_output(job.source.path, target, overwrite=overwrite)

    from ..runtime.load import load_source
    from .run import search_all

    _tell_replaced(job, reporter)
    check_calibration(job, reporter)
    pipe: Any = load_source(job.source, device=device, dtype=job.config.dtype, cached=False, reporter=reporter)
    with BundleWriter(
        job.source.path,
        target,
        replace=set(),
        run_key=job.run_key,
        reporter=reporter,
        arithmetic=arithmetic_of(pipe.device),
        overwrite=overwrite,
        resume=resume,
    ) as writer:
        result = search_all(pipe, job, writer, reporter)
        requirements.check(result.effect, writer, keep=keep_failed)
        for name, own in result.found.items():
            _write_beside(writer, name, own)
        writer.commit(
            lambda files: _manifest(job, result.found, result.effect, files, reporter.notices[earlier:]),
            {
                "command": "search-cache",
                "seconds": round(time.time() - started, 1),
                "speedup_measured": result.speedup,
                "cost_profile": {
                    name: [cost.model_dump() for cost in found.costs]
                    for name, found in result.found.items()
                    if found.costs
                },
                **describe_machine(),
            },
            lambda manifest: model_card(manifest, job.source.path),
        )
    _summarize(result.found, result.effect, result.speedup, reporter)
    return target


def prepare(
    source: str | Path | Source | None,
    config: SearchCacheConfig,
    reporter: Reporter,
    cost_profile: str | Path | None = None,
    reference: str | Path | Source | None = None,
    calib: str | Path | None = None,
) -> Job:
    """Resolve names and check everything that can be checked without reading weights.

    Raises:
        DaccError: unknown method or component, no pipeline, a profile or calibration set that cannot be read, or
            another reference.
    """
    config = config.resolved()
    found = source if isinstance(source, Source) else resolve_source(_text(source), reporter=reporter)
    entry = zoo_entry_of(found)
    calibration = found.calibration if calib is None else Path(calib)
    record = calibration_record(calibration) if calibration else None
    if record:
        config = like_calibration(config, record, reporter)
    given, content = given_schedule(config) if config.method == GIVEN else (None, None)
    steps = config.steps or given or (entry.num_inference_steps if entry else DEFAULT_STEPS)
    config = config.model_copy(update={"steps": steps})
    components = select_components(found.path, list(config.component))
    hashes = {name: weight_hash(found.path / name) for name in components}
    costs = read_costs(Path(cost_profile)) if cost_profile else {}
    float_source = _reference(found, components, config, reference, reporter)
    identity = {
        "source": source_identity(found.path, hashes),
        "config": told_config(config),
        "costs": costs,
        "schedule": content,
        "reference": float_source is not None,
    }
    if record:
        identity["calibration"] = record.id
    run_key = hashlib.sha256(json.dumps({"search-cache": identity}, sort_keys=True).encode()).hexdigest()
    return Job(
        found, config, components, hashes, costs, float_source, calibration, record.id if record else None, run_key
    )


def check_calibration(job: Job, reporter: Reporter) -> None:
    """Read through the calibration set that was named, if one was.

    Raises:
        ModelError: it was made with another model.
        BundleError: it is damaged.
    """
    if job.calibration:
        from ..calibrate.inputs import given_calibration

        given_calibration(job.source, job.hashes, job.calibration, reporter)


def _reference(
    source: Source,
    components: list[str],
    config: SearchCacheConfig,
    given: str | Path | Source | None,
    reporter: Reporter,
) -> Source | None:
    """The float pipeline of a quantized source: the one that was given, else where its manifest says."""
    if given is None:
        return find_reference(source, reporter)
    if not any(wants_reference(method, config) for method in config.methods()):
        reporter.notice(f"method {config.method} compares with no float pipeline here: --reference is not used.")
        return None
    manifest = read_manifest(source.path)
    treated = {name: manifest.components.get(name) for name in components} if manifest else {}
    rounded = {name: record.reference_hash for name, record in treated.items() if record and record.quantization}
    if not rounded:
        reporter.notice(f"{source.name} is not quantized: --reference is not used.")
        return None
    return given_reference(given, source, rounded, reporter)


def default_output(job: Job) -> Path:
    """`./digits-unet-cached-2x-dp`."""
    config = job.config
    if config.method == GIVEN:
        return Path(f"{job.source.name}-cached-{GIVEN}")
    goal = f"{config.speedup:g}x" if config.speedup is not None else f"{config.macs_ratio:g}macs"
    return Path(f"{job.source.name}-cached-{goal}-{config.method}")


def _text(source: str | Path | None) -> str | None:
    return None if source is None else str(source)


def _write_beside(writer: BundleWriter, component: str, found: Found) -> None:
    """What belongs to a plan, in place of what belonged to an earlier one."""
    for old in beside_plan(component):
        writer.leave_out(old)
    if found.tables:
        writer.write_table(f"{component}/{CORRECTION_NAME}", found.tables, info="correction of reused values")
    for file, content in found.files.items():
        writer.write_bytes(file, content)


def _tell_replaced(job: Job, reporter: Reporter) -> None:
    manifest = read_manifest(job.source.path)
    for name in job.components:
        record = manifest.components.get(name) if manifest else None
        if record and record.cache:
            reporter.notice(f"the {record.cache.method} plan that {name} had is replaced")


def _manifest(
    job: Job, found: dict[str, Found], effect: Effect, files: dict[str, FileRecord], notices: list[str]
) -> Manifest:
    """The new manifest: this pass after those of the source, untreated components as they were."""
    import torch

    before = read_manifest(job.source.path)
    known = before.components if before else {}
    treated = {
        name: (known[name] if name in known else _float_record(job, name, files)).model_copy(
            update={"cache": own.record}
        )
        for name, own in found.items()
    }
    this = PassRecord(
        command="search-cache",
        config=told_config(job.config),
        seed=job.config.seed,
        threads=torch.get_num_threads(),
        calibration=job.calibration_id,
        notices=list(notices),
        effect={"pipeline": effect},
    )
    source = SourceRecord(name=job.source.identity, revision=job.source.revision, weights=job.hashes)
    pipeline = pipeline_class(job.source.path)
    return Manifest.after(before, [this], source=source, pipeline=pipeline, components=treated, files=files)


def _float_record(job: Job, name: str, files: dict[str, FileRecord]) -> ComponentRecord:
    """A component whose weights no pass has touched."""
    tensors = component_tensors(job.source.path / name)
    parameters = sum(prod(info.shape) for _, info in tensors.values())
    size = component_weight_bytes(files, name)
    return ComponentRecord(
        class_name=component_entries(job.source.path)[name][1],
        weight_hash=component_weight_hash(files, name),
        reference_hash=job.hashes[name],
        parameters=parameters,
        bytes_fp32=4 * parameters,
        bytes_before=size,
        bytes_after=size,
    )


def _summarize(found: dict[str, Found], effect: Effect, speedup: float | None, reporter: Reporter) -> None:
    """The closing lines on stderr."""
    for name, own in found.items():
        chosen, plan = own.record.chosen, own.record.plan
        codes = ", ".join(f"{unit} {codes}" for unit, codes in plan.codes.items())
        codes = codes if len(plan.codes) <= TOLD_UNITS else f"{len(plan.codes)} units"
        reporter.say(
            f"{name}: {chosen['computed']} of {chosen['calls']} calls compute everything, "
            f"{own.record.macs_ratio:.3f} of the MACs; {codes}"
        )
    if speedup is not None:
        reporter.say(f"measured: the denoiser loop is {speedup:.2f} times as fast")
    reporter.say(f"difference to the source without plan: {effect.told()}")
