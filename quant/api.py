"""`dacc quantize` from request to bundle: prepare, quantize each component, measure, write.

Everything that needs no weights happens first and without importing torch, so that a wrong option or a result that
already exists is answered at once.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..calibrate.api import prepare as prepare_calibration
from ..core.bundle import BundleWriter, component_weight_bytes, component_weight_hash, existing_bundle
from ..core.calibration import calibration_id
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
from ..core.reporter import Reporter, silent
from ..core.requirements import Requirements, parse_requirements
from ..core.safe_read import weight_hash
from ..core.source import Source, resolve_source
from ..core.treatable import refuse_other_libraries, refuse_quantized
from .config import METHODS, QuantizeConfig, on_the_fly
from .fuse import Lora, check_fusing, find_lora, fused
from .outcome import summarize, tell_of_target


@dataclass(frozen=True)
class Job:
    """Everything that is decided before the first weight is read."""

    source: Source
    config: QuantizeConfig  # resolved
    components: list[str]
    hashes: dict[str, str]  # component -> weight hash
    calibration: Path | None  # set that was given
    run_key: str  # names this very result
    loras: tuple[Lora, ...] = ()  # to be added first
    fused_hashes: dict[str, str] | None = None  # component -> weight hash, when they were added
    before: Manifest | None = None  # of SOURCE; a copy with adapters has none

    @property
    def float_hashes(self) -> dict[str, str]:
        """Of the weights that are rounded."""
        return self.fused_hashes or self.hashes


def quantize_pipeline(
    source: str | Path | Source | None,
    config: QuantizeConfig | None = None,
    *,
    calib: str | Path | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = True,
    device: str = "auto",
    require: tuple[str, ...] = (),
    keep_failed: bool = False,
    fuse_lora: Sequence[str | Path] = (),
    reporter: Reporter | None = None,
) -> Path:
    """Quantize the denoisers of a pipeline and write a bundle.

    Args:
        source: a pipeline folder, bundle, Hub id or `zoo:NAME`; None is the embedded default.
        config: what to do; the defaults are 4-bit weights by the best method that needs no calibration.
        calib: calibration set for methods that need one; None: the one that `source` names, else one made on the fly.
        output: the folder to make; default `./<source>-w<bits>a<act bits>-<method>`.
        overwrite: replace an existing folder (only when the new one is complete).
        resume: take over the layers that an interrupted run of the same config had finished.
        device: where the arithmetic and the comparison with the float pipeline run.
        require: floors such as "psnr>=25"; when one is missed nothing is put in place.
        keep_failed: keep what missed a floor as `<output>.failed`.
        fuse_lora: adapter files, as "style.safetensors:0.8", that are added to the weights before anything else.

    Returns:
        The bundle's folder. If it already holds this very result it is returned at once.

    Raises:
        DaccError: see its subclasses; nothing of the user's is touched then.
    """
    config, reporter, started = config or QuantizeConfig(), reporter or silent(), time.time()
    earlier = len(reporter.notices)  # a reporter may have served another pass before
    requirements = parse_requirements(require, "quantize", measure=config.measure)
    job = prepare(source, config, reporter, calib, fuse_lora)
    target = chosen_output(output, default_output(job))
    if not overwrite and existing_bundle(target, job.run_key):
        return requirements.accept(target, reporter)
    check_output(job.source.path, target, overwrite=overwrite)

    with ExitStack() as stack:
        if job.loras:
            whole = stack.enter_context(fused(job.source, job.loras, target, reporter))
            hashes = {name: weight_hash(whole.path / name) for name in job.components}
            job = replace(job, source=whole, fused_hashes=hashes)
        _write(
            job,
            target,
            requirements,
            earlier=earlier,
            started=started,
            overwrite=overwrite,
            resume=resume,
            device=device,
            keep_failed=keep_failed,
            reporter=reporter,
        )
    summarize(job.config, target, job.components, device, reporter)
    return target


def _write(
    job: Job,
    target: Path,
    requirements: Requirements,
    *,
    earlier: int,
    started: float,
    overwrite: bool,
    resume: bool,
    device: str,
    keep_failed: bool,
    reporter: Reporter,
) -> None:
    """Quantize the components into a bundle at `target`.

    Args:
        earlier: notices of other passes that the reporter has served.
        started: when, in seconds.
    """
    from ..calibrate.inputs import calibration_of
    from ..runtime.load import pick_device
    from ..runtime.measure import measure_bundle
    from .driver import check_plans, quantize_component

    method, calibration = METHODS.load(job.config.method), None
    if job.config.needs_calibration:
        check_plans(job, method, reporter)  # before the minutes that a calibration set takes
        made = on_the_fly(job.config, job.float_hashes)
        calibration = calibration_of(
            job.source, job.float_hashes, made, job.calibration, device=device, reporter=reporter
        )
    elif job.calibration:
        reporter.notice(f"{job.config.method} needs no calibration set here: {job.calibration.name} is not used.")
    with BundleWriter(
        job.source.path,
        target,
        replace=set(job.components),
        run_key=job.run_key,
        reporter=reporter,
        arithmetic=arithmetic_of(pick_device(device)),
        overwrite=overwrite,
        resume=resume,
    ) as writer:
        records = {
            name: quantize_component(job, name, method, writer, device, reporter, calibration)
            for name in job.components
        }
        writer.carry_unchanged()
        effect = measure_bundle(
            job.source,
            writer.folder,
            measure=job.config.measure,
            device=device,
            seed=job.config.seed,
            reporter=reporter,
        )
        requirements.check(effect, writer, keep=keep_failed)
        _tell_kept_plans(job, reporter)
        writer.commit(
            lambda files: _manifest(
                job, records, effect, files, reporter.notices[earlier:], calibration.record.id if calibration else None
            ),
            {"command": "quantize", "seconds": round(time.time() - started, 1), **describe_machine()},
            lambda manifest: model_card(manifest, job.source.path),
        )


def prepare(
    source: str | Path | Source | None,
    config: QuantizeConfig,
    reporter: Reporter,
    calib: str | Path | None = None,
    fuse_lora: Sequence[str | Path] = (),
) -> Job:
    """Resolve names and check everything that can be checked without reading weights.

    Raises:
        DaccError: unknown method or component, no pipeline, or a component that is already quantized.
    """
    if config.method == "auto":
        reporter.detail("method auto: rtn, the method that needs no calibration set")
    config = config.resolved()
    tell_of_target(config, reporter)
    if config.is_data_free:
        reporter.notice(
            f"{config.method} looks at weights alone, as asked: expect more error than with a calibration set"
        )
    found = source if isinstance(source, Source) else resolve_source(_text(source), reporter=reporter)
    components = select_components(found.path, list(config.component))
    refuse_other_libraries(found, components)
    refuse_quantized(found, components)
    loras = tuple(find_lora(str(text)) for text in fuse_lora)
    if loras:
        check_fusing(found)
    hashes = {name: weight_hash(found.path / name) for name in components}
    calibration = found.calibration if calib is None else Path(calib)
    given_id = calibration_id(calibration) if calibration else None  # also where it is not needed: a typo is one
    origin = source_identity(found.path, hashes)
    identity: dict[str, Any] = {"source": origin, "config": config.model_dump(mode="json")}
    if config.needs_calibration:
        made = on_the_fly(config, components)
        request = None if calibration else prepare_calibration(found, made, "float32", reporter).request
        identity["calibration"] = given_id or request
    if loras:
        identity["loras"] = [(lora.sha256, lora.scale) for lora in loras]
    run_key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return Job(found, config, components, hashes, calibration, run_key, loras, before=read_manifest(found.path))


def default_output(job: Job) -> Path:
    """`./digits-unet-w4a16-rtn`, `./digits-dit-w4a16-nvfp4-rtn`."""
    form = "" if job.config.format == "integer" else f"-{job.config.format}"
    return Path(f"{job.source.name}-w{job.config.bits}a{job.config.act_bits}{form}-{job.config.method}")


def _text(source: str | Path | None) -> str | None:
    return None if source is None else str(source)


def _manifest(
    job: Job,
    records: dict[str, ComponentRecord],
    effect: Effect,
    files: dict[str, FileRecord],
    notices: list[str],
    calibration: str | None,
) -> Manifest:
    """The new manifest: this pass after those of the source, untreated components as they were."""
    import torch

    before = job.before
    written = {name: _with_written_files(record, name, files, before) for name, record in records.items()}
    this = PassRecord(
        command="quantize",
        config=job.config.model_dump(mode="json"),
        seed=job.config.seed,
        threads=torch.get_num_threads(),
        calibration=calibration,
        notices=list(notices),
        effect={"pipeline": effect},
    )
    source = SourceRecord(name=job.source.identity, revision=job.source.revision, weights=job.hashes)
    passes = [*(lora.record() for lora in job.loras), this]
    pipeline = pipeline_class(job.source.path)
    return Manifest.after(before, passes, source=source, pipeline=pipeline, components=written, files=files)


def _with_written_files(
    record: ComponentRecord, name: str, files: dict[str, FileRecord], before: Manifest | None
) -> ComponentRecord:
    """Fill in hash and size, which are known only when the files are written, and keep what earlier passes did."""
    facts: dict[str, Any] = {
        "weight_hash": component_weight_hash(files, name),
        "bytes_after": component_weight_bytes(files, name),
    }
    if before and name in before.components:
        known = before.components[name]
        facts |= {"cache": known.cache, "pruning": known.pruning, "bytes_before": known.bytes_before}
    return record.model_copy(update=facts)


def _tell_kept_plans(job: Job, reporter: Reporter) -> None:
    for name in job.components:
        record = job.before.components.get(name) if job.before else None
        if record and record.cache:
            reporter.notice(
                f"the cache plan of {name} was searched before its weights were rounded; dacc search-cache on the "
                "result fits it anew"
            )
