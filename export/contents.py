"""A component as its files hold it: floats as they are, quantized layers as values, none of them read yet.

Letters: O output channels, K input features per row, as in runtime/weight.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..core.families import find_family
from ..core.manifest import ComponentRecord, ModuleRecord
from ..core.pipeline import walk_layers
from ..core.safe_read import read_json
from ..core.scheme import Scheme
from ..core.tensor_file import StoredTensor, stored_tensors
from ..runtime.quantized_layer import STORED_NAMES
from ..runtime.skeleton import build_skeleton
from ..runtime.weight import STATE_NAMES, QuantizedWeight


@dataclass(frozen=True)
class StoredLayer:
    """A quantized weight that lies in a file."""

    scheme: Scheme
    shape: tuple[int, ...]  # of the float weight
    tensors: Mapping[str, StoredTensor]  # by the names of runtime/weight.py

    def load(self) -> QuantizedWeight:
        """The weight in memory."""
        return QuantizedWeight(self.scheme, self.shape, **{name: kept.load() for name, kept in self.tensors.items()})


@dataclass(frozen=True)
class Contents:
    """One component."""

    name: str
    folder: Path
    config: dict[str, Any]  # config.json without what a quantizer adds
    floats: Mapping[str, StoredTensor]  # every parameter and buffer that is stored as floats
    layers: Mapping[str, StoredLayer]  # layer -> its weight, where that is integers
    bits: Mapping[str, int]  # layer -> bits of its weight in the bundle that is exported; empty for a float pipeline

    @property
    def class_name(self) -> str:
        """Class of the model."""
        return str(self.config.get("_class_name"))

    @property
    def is_text_encoder(self) -> bool:
        """Whether it is a model of transformers; those of diffusers name their class in config.json."""
        return "_class_name" not in self.config

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name of every tensor of the float model -> its shape, sorted."""
        found = {name: tensor.shape for name, tensor in self.floats.items()}
        found |= {f"{name}.weight": layer.shape for name, layer in self.layers.items()}
        return dict(sorted(found.items()))

    def load(self, name: str) -> Tensor:
        """A tensor of the float model, integers dequantized to float32."""
        if name in self.floats:
            return self.floats[name].load()
        return self.layers[name.removesuffix(".weight")].load().dequantize()


def read_contents(component: Path, record: ComponentRecord | None, exported: ComponentRecord | None) -> Contents:
    """Read the headers of a component.

    Args:
        component: its folder.
        record: what the manifest there says of it; None for a float component.
        exported: what the manifest of the exported bundle says of it, which may not be the folder that is read.
    """
    stored = stored_tensors(component)
    config = {key: value for key, value in read_json(component / "config.json").items() if key != "quantization_config"}
    layers = {}
    for name, module in _quantized(record).items():
        assert module.scheme is not None
        assert module.shape is not None
        tensors = {key: stored[f"{name}.{key}"] for key in STATE_NAMES if f"{name}.{key}" in stored}
        layers[name] = StoredLayer(Scheme.from_name(module.scheme), tuple(module.shape), tensors)
    integers = {f"{name}.{key}" for name in layers for key in STORED_NAMES}
    floats = {name: tensor for name, tensor in stored.items() if name not in integers}
    bits = {name: Scheme.from_name(str(module.scheme)).bits for name, module in _quantized(exported).items()}
    return Contents(component.name, component, config, floats, layers, bits)


def layers_to_round(contents: Contents) -> set[str]:
    """Layers that a format of low precision rounds: those that the bundle has as integers; of a float pipeline all
    linears and convolutions but the first and last and those that embed time and class."""
    if contents.bits:
        return set(contents.bits)
    family, _ = find_family(contents.class_name)
    return {
        name
        for name, layer in walk_layers(build_skeleton(contents.folder))
        if not isinstance(layer, nn.Embedding) and family.role(name) not in ("edge", "temporal")
    }


def _quantized(record: ComponentRecord | None) -> dict[str, ModuleRecord]:
    modules = record.quantization.modules if record and record.quantization else {}
    return {name: module for name, module in modules.items() if module.scheme is not None}
