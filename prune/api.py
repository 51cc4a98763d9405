"""`dacc prune` from request to bundle: prepare, choose and remove in each component, measure, write.

Everything that needs no weights happens first and without importing torch, so that a wrong option or a result that
already exists is answered at once.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..calibrate.api import prepare as prepare_calibration
from ..calibrate.config import CalibrateConfig
from ..core.bundle import BundleWriter, existing_bundle
from ..core.cache_plan import beside_plan
from ..core.calibration import calibration_id
from ..core.card import model_card
from ..core.identity import source_identity
from ..core.machine import arithmetic_of, describe_machine
from ..core.manifest import read_manifest
from ..core.output import check_output, chosen_output
from ..core.pipeline import select_components
from ..core.reporter import Reporter, silent
from ..core.requirements import parse_requirements
from ..core.safe_read import weight_hash
from ..core.source import Source, component_entries, resolve_source
from ..core.treatable import refuse_other_libraries
from .config import PruneConfig, on_the_fly
from .outcome import manifest_of, summarize, tell_of_size
from .recovery.config import RecoveryConfig
from .settings import MethodConfig
from .sources import float_source, refuse_treated


@dataclass(frozen=True)
class Job:
    """Everything that is decided before the first weight is read."""

    source: Source
    config: PruneConfig  # resolved
    settings: MethodConfig
    recovery: RecoveryConfig
    components: list[str]
    hashes: dict[str, str]  # component -> weight hash
    classes: dict[str, str]  # component -> class
    calibration: Path | None  # set that was given
    run_key: str  # names this very result

    @property
    def scored(self) -> list[str]:
        """Components whose units are judged on a calibration set."""
        return [name for name in self.components if self.config.scores(self.classes[name])]

    @property
    def running(self) -> list[str]:
        """Components that have to run on a calibration set, to be judged or to teach."""
        return self.components if self.recovery.steps else self.scored


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
    requirements = parse_requirements(require, "prune", measure=config.measure)
    job = prepare(source, config, reporter, calib, from_reference=from_reference)
    target = chosen_output(output, default_output(job))
    if not overwrite and existing_bundle(target, job.run_key):
        return requirements.accept(target, reporter)
    check_output(job.source.path, target, overwrite=overwrite)

    from ..runtime.load import pick_device
    from ..runtime.measure import measure_bundle
    from .run import calibration_for, prune_component, refuse_checkpointing

    refuse_checkpointing(job)
    calibration = calibration_for(job, device, reporter)
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
            lambda files: manifest_of(
                job, pruned, effect, files, reporter.notices[earlier:], calibration.record.id if calibration else None
            ),
            {
                "command": "prune",
                "seconds": round(time.time() - started, 1),
                "latency_ms": {name: own.latency_ms for name, own in pruned.items() if own.latency_ms},
                "recovery_cpu_seconds": {
                    name: own.recovery_cpu_seconds for name, own in pruned.items() if own.recovery_cpu_seconds
                },
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
    settings, recovery = config.of_method(), config.of_recovery()
    found = source if isinstance(source, Source) else resolve_source(_text(source), reporter=reporter)
    components = select_components(found.path, list(config.component))
    refuse_other_libraries(found, components)
    if from_reference:
        found = float_source(found, components, reporter)
    refuse_treated(found, components)
    hashes = {name: weight_hash(found.path / name) for name in components}
    entries = component_entries(found.path)
    classes = {name: entries[name][1] for name in components}
    calibration = found.calibration if calib is None else Path(calib)
    given_id = calibration_id(calibration) if calibration else None  # also where it is not needed: a typo is one
    origin = source_identity(found.path, hashes)
    identity: dict[str, Any] = {"source": origin, "config": config.model_dump(mode="json")}
    job = Job(found, config, settings, recovery, components, hashes, classes, calibration, "")
    if job.running and calibration:
        identity["calibration"] = given_id
    elif job.running:
        identity["calibration"] = prepare_calibration(found, calibration_config(job), "float32", reporter).request
    elif calibration:
        reporter.notice(f"{config.method} needs no calibration set here: {calibration.name} is not used.")
    run_key = hashlib.sha256(json.dumps({"prune": identity}, sort_keys=True).encode()).hexdigest()
    return replace(job, run_key=run_key)


def calibration_config(job: Job) -> CalibrateConfig:
    """What is run when no set is given."""
    return on_the_fly(job.config, job.settings, job.running)


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
