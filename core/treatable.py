"""Components that a pass cannot treat."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from .errors import UnsupportedError
from .manifest import FORMAT, read_manifest
from .pipeline import denoiser_names
from .safe_read import read_json
from .source import Source, component_entries

OURS = "dacc"  # the quant_method of our bundles


def refuse_other_libraries(source: Source, components: list[str], libraries: Collection[str] = ("diffusers",)) -> None:
    """Schedulers, tokenizers and text encoders have no layers that a diffusers loader would unpack.

    Args:
        libraries: whose models may be treated.

    Raises:
        UnsupportedError: a component is no diffusers model.
    """
    classes = component_entries(source.path)
    for name in components:
        library, class_name = classes[name]
        if library not in libraries or not (source.path / name / "config.json").is_file():
            raise UnsupportedError(
                f"{name} of {source.name} is a {class_name} of {library}, not a diffusers model.",
                mend=f"Choose from {', '.join(denoiser_names(source.path))} with --component.",
            )


def refuse_quantized(source: Source, components: list[str]) -> None:
    """Rounded weights are not rounded again.

    Raises:
        UnsupportedError: a component has integers, whoever made them.
    """
    manifest = read_manifest(source.path)
    for name in components:
        if method := quantized_by(source.path / name):
            origin = f" ({manifest.source.name})" if manifest else ""
            raise UnsupportedError(
                f"{name} of {source.name} is already quantized by {method}.",
                "Quantizing rounded weights again would add their errors.",
                f"Run dacc quantize on the float source{origin}.",
            )


def quantized_by(folder: Path) -> str | None:
    """The method in a component's config.json, whoever made it; None for a float component, pruned or not."""
    found = _quantization_config(folder)
    if found is None or (found.get("quant_method") == OURS and not found.get("modules")):
        return None
    return str(found.get("quant_method", "an unknown method"))


def identity_modules_of(folder: Path) -> list[str]:
    """Modules of a component that pass on what enters them, where its class builds more than is left of it."""
    found = _quantization_config(folder) or {}
    names = found.get("identity_modules", []) if found.get("quant_method") == OURS else []
    return [str(name) for name in names]


def identity_config(names: Sequence[str]) -> dict[str, Any]:
    """What config.json says of a float component with such modules: without dacc no loader takes it for a whole one."""
    return {"quant_method": OURS, "format": FORMAT, "schemes": {}, "modules": {}, "identity_modules": list(names)}


def _quantization_config(folder: Path) -> dict[str, Any] | None:
    file = folder / "config.json"
    config = read_json(file) if file.is_file() else None
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return found if isinstance(found, dict) else None
