"""Find the denoisers of a pipeline and walk their layers. Works on pipeline objects and on model_index.json alike."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import nearest
from .errors import ConfigError, UnsupportedError
from .source import PIPELINE_INDEX, component_entries

if TYPE_CHECKING:
    from torch import nn

DENOISER_ROLES = ("unet", "transformer", "transformer_2", "prior", "decoder", "unet_2")
DENOISER_CLASS_ENDS = ("Transformer2DModel", "Transformer3DModel", "TransformerModel", "ConditionModel")
DENOISER_CLASS_STARTS = ("UNet",)


def pipeline_class(folder: Path) -> str:
    """The `_class_name` of model_index.json."""
    index = json.loads((folder / PIPELINE_INDEX).read_text(encoding="utf-8"))
    return str(index.get("_class_name", "DiffusionPipeline"))


def denoiser_names(folder: Path) -> list[str]:
    """Names of the components that are called at every step, by class and role, never by the name "unet" alone.

    Raises:
        UnsupportedError: the pipeline has none.
    """
    found = [name for name, (library, cls) in component_entries(folder).items() if is_denoiser(name, library, cls)]
    if not found:
        classes = ", ".join(f"{name}: {cls}" for name, (_, cls) in component_entries(folder).items())
        raise UnsupportedError(
            f"{folder.name} has no denoiser that dacc knows ({classes}).",
            mend="Give a pipeline with a UNet or transformer.",
        )
    return found


def select_components(folder: Path, wanted: list[str]) -> list[str]:
    """The components to treat: `wanted`, or all denoisers when it is empty.

    Raises:
        ConfigError: a wanted component does not exist; the nearest names are given.
    """
    if not wanted:
        return denoiser_names(folder)
    known = list(component_entries(folder))
    for name in wanted:
        if name not in known:
            raise ConfigError(f"{folder.name} has no component {name!r}.", mend=nearest(name, known))
    return list(dict.fromkeys(wanted))


def is_denoiser(name: str, library: str, class_name: str) -> bool:
    """Whether a component is a denoiser: a diffusers model whose class or role says so."""
    if library != "diffusers":
        return False
    return (
        name in DENOISER_ROLES
        or class_name.startswith(DENOISER_CLASS_STARTS)
        or class_name.endswith(DENOISER_CLASS_ENDS)
    )


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """Denoisers of a loaded pipeline, in the order of its components."""
    found = {name: getattr(part, "_orig_mod", part) for name, part in pipe.components.items()}  # compiled: look inside
    return {
        name: pipe.components[name]
        for name, module in found.items()
        if module is not None and is_denoiser(name, type(module).__module__.split(".")[0], type(module).__name__)
    }


def walk_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer with weights that dacc can treat (linear, convolution, embedding): dotted name and module."""
    from torch import nn

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            yield name, module
