"""What is said and recorded once a pruned pipeline is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.bundle import component_weight_bytes, component_weight_hash
from ..core.manifest import ComponentRecord, Effect, FileRecord, Manifest, PassRecord, SourceRecord, read_manifest
from ..core.pipeline import pipeline_class
from ..core.reporter import Reporter

if TYPE_CHECKING:
    from .api import Job
    from .run import Pruned

NO_PRODUCT = 0.25 * 0.95  # share of the parameters from which on nobody should do without recovery


def tell_of_size(pruned: dict[str, Pruned], reporter: Reporter) -> None:
    """A notice where so much is gone that the result is of no use as it is."""
    for name, own in pruned.items():
        share = 1 - own.record.parameters_after / own.record.parameters_before
        if share >= NO_PRODUCT and own.record.recovery is None:
            reporter.notice(
                f"{name} lost {share:.0%} of its parameters and nothing was trained to make up for them: "
                "expect visibly worse results"
            )


def manifest_of(
    job: Job,
    pruned: dict[str, Pruned],
    effect: Effect,
    files: dict[str, FileRecord],
    notices: list[str],
    calibration: str | None,
) -> Manifest:
    """The new manifest: this pass after those of the source, untreated components as they were."""
    import torch

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
    pipeline = pipeline_class(job.source.path)
    return Manifest.after(
        read_manifest(job.source.path), [this], source=source, pipeline=pipeline, components=written, files=files
    )


def summarize(pruned: dict[str, Pruned], effect: Effect, reporter: Reporter) -> None:
    """The closing lines on stderr."""
    for name, own in pruned.items():
        record = own.record
        gone = [unit for unit, found in record.units.items() if found.removed]
        share = 1 - record.parameters_after / record.parameters_before
        reporter.say(
            f"{name}: {record.parameters_before / 1e6:.2f} M parameters -> {record.parameters_after / 1e6:.2f} M "
            f"({share:.1%} fewer), without {', '.join(gone[:6])}{' and more' if len(gone) > 6 else ''}"
        )
        if record.recovery:
            reporter.say(
                f"{name}: trained for {record.recovery.steps_done} steps ({record.recovery.stopped}): relative squared "
                f"error of the outputs {record.recovery.error_before:.4g} -> {record.recovery.error_after:.4g}"
            )
        if record.identity_modules:
            reporter.say(f"{name}: its config cannot tell this: load it with dacc.load, or after `import dacc`")
    reporter.say(f"difference to the source: {effect.told()}")
