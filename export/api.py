"""`dacc export` from request to folder: what is exported, from which weights, and what is lost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..core.config import Config, build_config
from ..core.errors import UnsupportedError
from ..core.manifest import ComponentRecord, Manifest, read_manifest
from ..core.output import check_output, chosen_output
from ..core.pipeline import select_components
from ..core.reference import find_reference, given_reference, has_weights
from ..core.reporter import Reporter, silent
from ..core.source import Source, component_entries, resolve_source
from ..core.treatable import quantized_by, refuse_other_libraries
from ..core.verify import check_bundle
from .config import TARGETS, ExportConfig
from .losses import check_losses

TEXT_LIBRARY = "transformers"
SourceLike = str | Path | Source


@dataclass(frozen=True)
class Job:
    """Everything that is decided before the first weight is read."""

    source: Source
    manifest: Manifest | None
    config: ExportConfig
    target: ModuleType
    settings: Config  # of the target
    components: list[str]


@dataclass(frozen=True)
class Origin:
    """Where the exported weights come from."""

    folder: Path
    manifest: Manifest | None
    said: str


def export_pipeline(
    source: SourceLike | None,
    config: ExportConfig,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    reference: SourceLike | None = None,
    reporter: Reporter | None = None,
) -> Path:
    """Write a pipeline in a format that other programs read.

    Args:
        source: a pipeline folder, bundle, Hub id or `zoo:NAME`; None is the embedded default.
        config: which format, and its options.
        output: the folder to make; default `./<source>-<format>`.
        overwrite: replace an existing folder (only when the new one is complete).
        reference: the float pipeline, for formats that round weights anew; None: the one that the bundle was made from,
            where it is found with the same weights, else what the integers of the bundle stand for.

    Returns:
        The folder.

    Raises:
        DaccError: see its subclasses; nothing of the user's is touched then.
    """
    reporter = reporter or silent()
    earlier = len(reporter.notices)
    job = prepare(source, config, reporter)
    folder = chosen_output(output, f"{job.source.name}-{config.format}")
    check_output(job.source.path, folder, overwrite=overwrite)
    lost = check_losses(job.manifest, job.components, job.target.KEEPS, lossy=config.lossy, reporter=reporter)
    origin = _origin(job, reference, reporter)

    from .contents import read_contents
    from .folder import ExportWriter

    with ExportWriter(
        job.source.path, folder, replace=job.components, reporter=reporter, overwrite=overwrite
    ) as writer:
        written, lines = {}, []
        for name in job.components:
            # what no pass has touched is that of the source: another text encoder may lie beside the reference
            place = origin if _of(job.manifest, name) else Origin(job.source.path, job.manifest, origin.said)
            contents = read_contents(place.folder / name, _of(place.manifest, name), _of(job.manifest, name))
            written[name] = job.target.write(contents, writer.component(name), job.settings, reporter)
            lines.append(job.target.load_lines(contents, written[name]))
        writer.write_text("README.md", _readme(job, origin, lost, lines))
        writer.commit(_record(job, origin, written, lost, reporter.notices[earlier:]))
    return folder


def prepare(source: SourceLike | None, config: ExportConfig, reporter: Reporter) -> Job:
    """Check everything that can be checked without weights.

    Raises:
        ConfigError: an option is wrong.
        ModelError: the source is not a pipeline.
        UnsupportedError: the format cannot hold a component.
    """
    target: Any = TARGETS.load(config.format)
    settings = build_config(target.CONFIG, **config.settings)
    text = None if source is None else str(source)
    found = source if isinstance(source, Source) else resolve_source(text, reporter=reporter)
    manifest = check_bundle(found.path)
    components = select_components(found.path, list(config.component))
    _check_libraries(found, components, config.format)
    for name in components:
        if (method := quantized_by(found.path / name)) not in (None, "dacc"):
            raise UnsupportedError(
                f"{name} of {found.name} is quantized by {method}, whose weights dacc does not read.",
                mend="Give the float pipeline, or a bundle.",
            )
    return Job(found, manifest, config, target, settings, components)


def _check_libraries(source: Source, components: list[str], format: str) -> None:
    """Text encoders are models of transformers, which only some formats hold.

    Raises:
        UnsupportedError: a component is a model of another library than the format is for, or no model.
    """
    takes = {name: TARGETS.fact(name, "LIBRARIES", ("diffusers",)) for name in TARGETS.names()}
    if TEXT_LIBRARY not in takes[format]:
        for name, (library, class_name) in component_entries(source.path).items():
            if name in components and library == TEXT_LIBRARY:
                others = ", ".join(other for other, libraries in takes.items() if TEXT_LIBRARY in libraries)
                raise UnsupportedError(
                    f"{name} of {source.name} is a {class_name} of {library}, and {format} is read by no loader of it.",
                    mend=f"Give --format one of {others}, or leave out --component {name}.",
                )
    refuse_other_libraries(source, components, takes[format])


def _of(manifest: Manifest | None, component: str) -> ComponentRecord | None:
    return manifest.components.get(component) if manifest else None


def _origin(job: Job, reference: SourceLike | None, reporter: Reporter) -> Origin:
    """The weights that the format is made from.

    Raises:
        ModelError: the reference that was given is not the one that the bundle was made from.
    """
    own = Origin(job.source.path, job.manifest, "the weights as they are")
    found_records = [_of(job.manifest, name) for name in job.components]
    treated = any(record is not None and (record.quantization or not record.pruning) for record in found_records)
    if not treated or not job.target.ROUNDS:
        if reference is not None:
            reporter.notice(f"{job.config.format} is made from the weights as they are: --reference is not used.")
        return own
    assert job.manifest is not None
    # what was rounded: not what the chain started from, where adapters were fused before
    records = {name: _of(job.manifest, name) for name in job.components}
    rounded = {name: record.reference_hash for name, record in records.items() if record}
    if reference is not None:
        given = given_reference(reference, job.source, rounded, reporter)
        return Origin(given.path, read_manifest(given.path), "rounded anew from the float reference")
    if (found := find_reference(job.source, reporter)) and has_weights(found.path, rounded):
        reporter.notice(f"{job.config.format} rounds the weights of {found.identity}; the bundle's are not used.")
        return Origin(found.path, read_manifest(found.path), "rounded anew from the float reference")
    reporter.notice(
        f"{job.manifest.source.name} was not found with the weights that this bundle was made from: "
        f"{job.config.format} rounds what the integers of the bundle stand for once more. Give --reference SOURCE."
    )
    return Origin(job.source.path, job.manifest, "rounded once more from what the integers stand for")


def _record(
    job: Job, origin: Origin, written: dict[str, dict[str, Any]], lost: list[str], notices: list[str]
) -> dict[str, Any]:
    """What `dacc_export.json` says."""
    return {
        "format": job.config.format,
        "source": job.source.identity,
        "manifest": job.manifest.sha256() if job.manifest else None,
        "weights": origin.said,
        "settings": job.settings.model_dump(mode="json"),
        "components": written,
        "lost": lost,
        "notices": list(notices),
    }


def _readme(job: Job, origin: Origin, lost: list[str], lines: list[str]) -> str:
    """A model card that tells how to load the folder."""
    missing = "".join(f"\nLost: {text}.\n" for text in lost)
    code = "\n\n".join(dict.fromkeys(lines))
    return (
        f"# {job.source.name}, {job.config.format}\n\n"
        f"Exported by dacc from {job.source.identity}: {origin.said}.\n{missing}\n"
        f'```python\nfolder = "..."  # this folder\n{code}\n```\n'
    )
