"""The model card of a bundle: README.md with the metadata that the Hub reads and the facts that a person needs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .manifest import ComponentRecord, Manifest

CARRIED = ("license", "license_name", "license_link", "pipeline_tag", "datasets", "language")


def model_card(manifest: Manifest, source_folder: Path) -> str:
    """The text of README.md, licence and task copied from the card of the source when it has one."""
    return f"{_metadata(manifest, source_folder)}\n{_body(manifest)}"


def _metadata(manifest: Manifest, source_folder: Path) -> str:
    from huggingface_hub import ModelCardData

    source = _source_metadata(source_folder)
    name = manifest.source.name
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
    last = manifest.passes[-1]
    data = ModelCardData(
        library_name="diffusers",
        base_model=name if is_hub_id else None,
        base_model_relation="quantized" if is_hub_id else None,
        tags=sorted(
            {"dacc", *(f"dacc-{done.command}" for done in manifest.passes), str(last.config.get("method", ""))} - {""}
        ),
        **{key: source[key] for key in CARRIED if key in source},
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _source_metadata(source_folder: Path) -> dict[str, Any]:
    """The YAML header of the source's card; empty when there is none or it cannot be read."""
    file = source_folder / "README.md"
    if not file.is_file():
        return {}
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        return dict(ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict())
    except (ValueError, TypeError, YAMLError):
        return {}


def _body(manifest: Manifest) -> str:
    planned = any(record.cache for record in manifest.components.values())
    lines = [
        f"# {manifest.source.name}, compressed by dacc",
        "",
        "```python",
        "import dacc",
        'pipe = dacc.load("this/folder")  # or: import dacc, then diffusers.DiffusionPipeline.from_pretrained(...)'
        + (", which does not run the cache plan" if planned else ""),
        "```",
        "",
        "| component | class | parameters | float32 bytes | bytes here | share | scheme |",
        "|---|---|---|---|---|---|---|",
        *(_component_row(name, record) for name, record in manifest.components.items()),
        "",
        "## What was done",
        *(f"- `{done.command}` with {_words(done.config)}" for done in manifest.passes),
        "",
        "## Difference to the float pipeline, from the same noise",
        *(f"- {effect.told()}" for done in manifest.passes for effect in done.effect.values()),
    ]
    lines += _pruned_lines(manifest)
    notices = [notice for done in manifest.passes for notice in done.notices]
    if notices:
        lines += ["", "## Notices", *(f"- {notice}" for notice in notices)]
    lines += ["", f"Manifest sha256: `{manifest.sha256()}`", ""]
    return "\n".join(lines)


def _pruned_lines(manifest: Manifest) -> list[str]:
    """What was removed, and who can load the rest."""
    found = []
    for name, record in manifest.components.items():
        if record.pruning is None:
            continue
        gone = [unit for unit, part in record.pruning.units.items() if part.removed]
        found.append(
            f"- {name}: {record.pruning.parameters_before} parameters became {record.pruning.parameters_after}, "
            f"without {', '.join(gone)}"
        )
        if record.pruning.identity_modules:
            found.append(
                f"- {name} loads with dacc alone: {', '.join(record.pruning.identity_modules)} cannot be left out"
            )
    return ["", "## Removed blocks", *found] if found else []


def _component_row(name: str, record: ComponentRecord) -> str:
    schemes = ", ".join(record.quantization.schemes) if record.quantization else "float"
    return (
        f"| {name} | {record.class_name} | {record.parameters} | {record.bytes_fp32} | {record.bytes_after} "
        f"| {record.bytes_after / record.bytes_fp32:.3f} | {schemes} |"
    )


def _words(config: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in config.items() if value not in ((), [], {}, None, "auto"))
