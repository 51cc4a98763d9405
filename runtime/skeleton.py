"""A component's network without its weights: on the meta device, from its config alone."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import diffusers
from accelerate import init_empty_weights
from torch import nn

from ..core.errors import ModelError, UnsupportedError
from ..core.treatable import identity_modules_of
from .passthrough import bypass_


def build_skeleton(folder: Path) -> nn.Module:
    """Instantiate the model of a component folder on the meta device, without what was removed from it.

    Raises:
        ModelError: config.json is missing, unreadable, or holds what no model can be built from.
        UnsupportedError: not a diffusers model.
    """
    file = folder / "config.json"
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read ({error}).", mend="Give a complete pipeline folder.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file} is not a table of fields.", mend="Copy the pipeline again.")
    model_class = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(model_class, type) and issubclass(model_class, diffusers.ModelMixin)):
        raise UnsupportedError(
            f"{folder.name} is a {config.get('_class_name') or 'model without _class_name'}, not a diffusers model.",
            mend="Choose a diffusers model with --component.",
        )
    model = _from_config(model_class, config, file)
    bypass_(model, identity_modules_of(folder))
    return model


def _from_config(model_class: Any, config: dict[str, Any], file: Path) -> nn.Module:
    """The model on the meta device. Whatever goes wrong lies in its config: there is nothing else to build it from."""
    fields = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        with init_empty_weights():
            model: nn.Module = model_class.from_config(fields)
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError) as error:
        raise ModelError(
            f"no {model_class.__name__} can be built from {file} ({error}).", mend="Copy the pipeline again."
        ) from error
    return model


def passed_over(model: nn.Module, names: Collection[str]) -> set[str]:
    """Of the tensors that a file has and a model has not, those that diffusers leaves in the file without a word."""
    patterns: list[str] = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []  # Wan's has one
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}
