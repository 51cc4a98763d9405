"""`dacc prune` from request to bundle: prepare, choose and remove in each component, measure, write.

Everything that needs no weights happens first and without importing torch, so that a wrong option or a result that
already exists is answered at once.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibrate.api import prepare as prepare_calibration
from ..core.bundle import BundleWriter, component_weight_bytes, component_weight_hash, existing_bundle
from ..core.cache_plan import beside_plan
from ..core.calibration import calibration_id
from ..core.card import model_card
from ..core.config import Config, build_config
from ..core.errors import UnsupportedError
from ..core.machine import describe_machine
from ..core.manifest import ComponentRecord, Effect, FileRecord, Manifest, PassRecord, SourceRecord, read_manifest
from ..core.output import check_output
from ..core.pipeline import pipeline_class, select_components
from ..core.reporter import Reporter, silent
from ..core.requirements import parse_requirements
from ..core.safe_read import weight_hash
from ..core.source import Source, component_entries, resolve_source
from ..core.treatable import refuse_other_libraries
from .config import METHODS, PruneConfig, on_the_fly
from .outcome import summarize, tell_of_size
from .sources import float_source, refuse_treated

if TYPE_CHECKING:
    from .run import Pruned

REQUIRES = {"dacc": "0.1.0", "diffusers": "0.41.0", "torch": "2.9.0"}


@dataclass(frozen=True)
class Job:
    """Everything that is decided before the first weight is read."""

    source: Source
    config: PruneConfig  # resolved
    settings: Config  # of the method
    components: list[str]
    hashes: dict[str, str]  # component -> weight hash
    classes: dict[str, str]  # component -> class
    calibration: Path | None  # set that was given
    run_key: str  # names this very result

    @property
    def scored(self) -> list[str]:
        """Components whose units are judged on a calibration set."""
        return [name for name in self.components if self.config.scores(self.classes[name])]


def prune_pipeline(
    source: str | Path | Source | None,
    config: PruneConfig | None = None,
    *,
    calib: str | Path | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = True,
    device: str = "auto",
    require: tuple[str, ...] = (),
    keep_failed: bool = False,
    from_reference: bool = False,
    reporter: Reporter | None = None,
) -> Path:
    """Remove blocks from the denoisers of a pipeline and write a bundle.

    Args:
        source: a pipeline folder, bundle, Hub id or `zoo:NAME`; None is the embedded default.
        config: how much to remove and how to choose; the default is a quarter of the parameters, by scores.
        calib: calibration set for methods that judge; None: the one that `source` names, else one made on the fly.
        output: the folder to make; default `./<source>-pruned-<ratio>-<method>`.
        overwrite: replace an existing folder (only when the new one is complete).
        resume: take over what an interrupted run of the same config had found.
        device: where the denoiser is judged and the result compared with the source.
        require: floors such as "psnr>=25"; when one is missed nothing is put in place.
        keep_failed: keep what missed a floor as `<output>.failed`.
        from_reference: of a quantized bundle, prune the float pipeline that it was made from.

    Returns:
        The bundle's folder. If it already holds this very result it is returned at once.

    Raises:
        DaccError: see its subclasses; nothing of the user's is touched then.
    """
    config, reporter, started = config or PruneConfig(), reporter or silent(), time.time()
    earlier = len(reporter.notices)  # a reporter may have served another pass before
    requirements = parse_requirements(require)
    job = prepare(source, config, reporter, calib, from_reference=from_reference)
    target = Path(output) if output else default_output(job)
    if not overwrite and existing_bundle(target, job.run_key):
        return requirements.accept(target, reporter)
    check_output(job.source.path, target, overwrite=overwrite)

    from ..runtime.measure import measure_bundle
    from .run import calibration_for, prune_component

    calibration = calibration_for(job, device, reporter)
    with BundleWriter(
        job.source.path,
        target,
        replace=set(job.components),
        run_key=job.run_key,
        reporter=reporter,
        overwrite=overwrite,
        resume=resume,
    ) as writer:
        pruned = {name: prune_component(job, name, writer, calibration, device, reporter) for name in job.components}
        _drop_plans(job, writer, reporter)
        tell_of_size(pruned, reporter)
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
        writer.commit(
            lambda files: _manifest(
                job, pruned, effect, files, reporter.notices[earlier:], calibration.record.id if calibration else None
            ),
            {
                "command": "prune",
                "seconds": round(time.time() - started, 1),
                "latency_ms": {name: own.latency_ms for name, own in pruned.items() if own.latency_ms},
                **describe_machine(),
            },
            lambda manifest: model_card(manifest, job.source.path),
        )
    summarize(pruned, effect, reporter)
    return target


def prepare(
    source: str | Path | Source | None,
    config: PruneConfig,
    reporter: Reporter,
    calib: str | Path | None = None,
    *,
    from_reference: bool = False,
) -> Job:
    """Resolve names and check everything that can be checked without reading weights.

    Raises:
        DaccError: unknown method or component, no pipeline, or a component that is quantized or pruned already.
    """
    config = config.resolved()
    settings = build_config(METHODS.load(config.method).CONFIG, **config.settings)
    if config.recover:
        raise UnsupportedError(
            "--recover is not there yet.", "Nothing trains what is left.", "Leave it out, or ask for a smaller --ratio."
        )
    found = source if isinstance(source, Source) else resolve_source(_text(source), reporter=reporter)
    components = select_components(found.path, list(config.component))
    refuse_other_libraries(found, components)
    if from_reference:
        found = float_source(found, components, reporter)
    refuse_treated(found, components)
    hashes = {name: weight_hash(found.path / name) for name in components}
    entries = component_entries(found.path)
    classes = {name: entries[name][1] for name in components}
    calibration = Path(calib) if calib else found.calibration
    identity: dict[str, Any] = {"source": hashes, "config": config.model_dump(mode="json"), "dacc": REQUIRES["dacc"]}
    scored = [name for name in components if config.scores(classes[name])]
    if scored and calibration:
        identity["calibration"] = calibration_id(calibration)
    elif scored:
        made = calibration_config(config, settings, scored)
        identity["calibration"] = prepare_calibration(found, made, "float32", reporter).request
    elif calibration:
        reporter.notice(f"{config.method} needs no calibration set here: {calibration.name} is not used.")
    run_key = hashlib.sha256(json.dumps({"prune": identity}, sort_keys=True).encode()).hexdigest()
    return Job(found, config, settings, components, hashes, classes, calibration, run_key)


def calibration_config(config: PruneConfig, settings: Any, scored: list[str]) -> Any:
    """What is run when no set is given."""
    return on_the_fly(config, settings.samples, settings.timesteps, scored)


def default_output(job: Job) -> Path:
    """`./digits-dit-pruned-0.25-score`, `./digits-unet-pruned-bksdm`."""
    share = f"-{job.config.ratio:g}" if job.config.ratio is not None else ""
    return Path(f"{job.source.name}-pruned{share}-{job.config.method}")


def _text(source: str | Path | None) -> str | None:
    return None if source is None else str(source)


def _drop_plans(job: Job, writer: BundleWriter, reporter: Reporter) -> None:
    """Cache plans name blocks that may be gone."""
    manifest = read_manifest(job.source.path)
    for name in job.components:
        for file in beside_plan(name):
            writer.leave_out(file)
        record = manifest.components.get(name) if manifest else None
        if record and record.cache:
            reporter.notice(f"the cache plan of {name} is dropped: run dacc search-cache on the result")


def _manifest(
    job: Job,
    pruned: dict[str, Pruned],
    effect: Effect,
    files: dict[str, FileRecord],
    notices: list[str],
    calibration: str | None,
) -> Manifest:
    """The new manifest: this pass after those of the source, untreated components as they were."""
    import torch

    before = read_manifest(job.source.path)
    written = {
        name: ComponentRecord(
            class_name=job.classes[name],
            weight_hash=component_weight_hash(files, name),
            reference_hash=component_weight_hash(files, name),
            parameters=own.record.parameters_after,
            bytes_fp32=4 * own.record.parameters_after,
            bytes_before=own.bytes_before,
            bytes_after=component_weight_bytes(files, name),
            pruning=own.record,
        )
        for name, own in pruned.items()
    }
    this = PassRecord(
        command="prune",
        config=job.config.model_dump(mode="json"),
        seed=job.config.seed,
        threads=torch.get_num_threads(),
        calibration=calibration,
        notices=list(notices),
        effect={"pipeline": effect},
    )
    source = SourceRecord(name=job.source.identity, revision=job.source.revision, weights=job.hashes)
    return Manifest(
        requires=REQUIRES,
        source=before.source if before else source,
        pipeline=pipeline_class(job.source.path),
        passes=[*(before.passes if before else []), this],
        history=[*(before.history if before else []), *([before.sha256()] if before else [])],
        components={**(before.components if before else {}), **written},
        files=files,
    )
