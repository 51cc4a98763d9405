"""Text encoders are models of transformers: which of their linears its own loader of quantized weights replaces.

That library rounds all linears but the last layer, output embeddings and others with tied weights, and those that the
class keeps in float32, such as `wo` of T5, whose outputs are too large for float16. The same stay floats here. They are
named one by one, so that no version of the loader has to find them again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..core.errors import ModelError, UnsupportedError
from ..core.source import component_entries
from .contents import Contents


@dataclass(frozen=True)
class Split:
    """The linears of a text encoder, by the names that they have in its files."""

    rounded: dict[str, tuple[int, ...]]  # name -> shape of the weight
    modules: dict[str, str]  # of those, name -> that of the module in this version of transformers
    left_out: list[str]  # of the others, and their modules' names
    wide: list[str]  # of the others, the ones that the class keeps in float32 where all else is float16


def split_linears(contents: Contents) -> Split:
    """Which linears the loader takes for rounded ones.

    Raises:
        ModelError: config.json does not describe the class that model_index.json names.
        UnsupportedError: the class is unknown, or the files have other names than its modules.
    """
    model = _skeleton(contents)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D)}
    shapes = contents.shapes()
    weights = {name.removesuffix(".weight") for name in shapes if name.endswith(".weight")}
    stored = {name: _stored_name(name, weights) for name in layers}
    names, floats = _kept(model, layers), dict[str, str]()
    while caught := {name: stored[name] or name for name in layers if name not in floats and is_left_out(names, name)}:
        floats |= caught
        names |= {*caught, *caught.values()}  # they may stand for others in turn
    rounded = [name for name in layers if name not in floats]
    claims = Counter(stored[name] for name in rounded)
    if missing := [name for name in rounded if stored[name] is None or claims[stored[name]] > 1]:
        raise UnsupportedError(
            f"{contents.name} has no {missing[0]}.weight in its files.",
            "This version of transformers calls it so, and they do not.",
            "Save the model anew with this version, or choose --format safetensors-bf16.",
        )
    wide = [floats[name] for name in floats if is_left_out(model._keep_in_fp32_modules or (), name)]
    modules = {str(stored[name]): name for name in rounded}
    shape_of = {name: shapes[f"{name}.weight"] for name in modules}
    return Split(shape_of, modules, sorted({*floats, *floats.values()}), wide)


def is_left_out(names: Collection[str], layer: str) -> bool:
    """What any version of transformers leaves out, given these names: a name stands for the layers that end in it, and,
    as a regular expression, for whole parts of a path and all below them."""
    return any(layer.endswith(name) or re.search(rf"(?:^|\.)(?:{name})(?:\.|$)", layer) for name in names)


def _kept(model: transformers.PreTrainedModel, layers: Mapping[str, nn.Module]) -> set[str]:
    """What transformers leaves out when nobody names anything, and layers that are linear in other ways."""
    *_, (last, _) = model.named_parameters()
    tied = getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ()
    output = model.get_output_embeddings()
    found = {name.removesuffix(".weight") for name in (last, *tied)}
    found |= {name for name, layer in layers.items() if layer is output or type(layer) is not nn.Linear}
    return found | set(model._keep_in_fp32_modules or ())


def _stored_name(name: str, stored: Collection[str]) -> str | None:
    """What the files call a layer: versions of transformers differ in how many names of wrappers come first."""
    if name in stored:
        return name
    found = [other for other in stored if other.endswith(f".{name}") or name.endswith(f".{other}")]
    return found[0] if len(found) == 1 else None


def _skeleton(contents: Contents) -> transformers.PreTrainedModel:
    """The model on the meta device."""
    _, class_name = component_entries(contents.folder.parent)[contents.name]
    model_class: Any = getattr(transformers, class_name, None)
    known = isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    if not known:
        raise UnsupportedError(
            f"{contents.name} is a {class_name}, no model of transformers {transformers.__version__}.",
            mend="Choose --format safetensors-bf16, or another version.",
        )
    try:
        config = model_class.config_class.from_pretrained(contents.folder, local_files_only=True)
        with init_empty_weights():
            return model_class(config)
    except (OSError, TypeError, ValueError, StrictDataclassError) as error:
        raise ModelError(
            f"{contents.folder / 'config.json'} does not describe a {class_name} ({error}).",
            mend="Copy the pipeline again.",
        ) from None
