"""Linears as rows of 8-bit integers with one scale each, w = scale * q: what several loaders hold.

Codes of a bundle that are such rows already stay as they are; what other integers stand for, and floats, is rounded to
nearest. Letters: O output and K input features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.pipeline import walk_layers
from ..core.reporter import Reporter
from ..core.tensor_file import LazyTensor, Writable
from ..runtime.skeleton import build_skeleton
from ..runtime.weight import integer_rows
from .contents import Contents, StoredLayer, layers_to_round
from .floats import FLOATS
from .text_encoders import split_linears

LARGEST = 127
Skips = Callable[[Collection[str], str], bool]


@dataclass(frozen=True)
class Choice:
    """Which linears a format rounds."""

    rounded: dict[str, tuple[int, ...]]  # name -> shape of the weight
    left_out: list[str]  # names that tell a loader what stays floating point
    wide: frozenset[str] = frozenset()  # layers that stay float32 where other floats become float16
    modules: Mapping[str, str] = field(default_factory=dict)  # name in the files -> a loader's


def choose_linears(contents: Contents, skips: Skips, reporter: Reporter) -> Choice:
    """Linears that the bundle has as integers, of a float pipeline all but the edges and those that embed time, of a
    text encoder those that transformers rounds.

    Loaders of diffusers take the names of layers that stay floats as patterns, under which others may fall. Where one
    does, the layer is rounded as well.

    Args:
        skips: whether a loader of diffusers that is given these names leaves out a layer.
    """
    if contents.is_text_encoder:
        split = split_linears(contents)
        return Choice(split.rounded, split.left_out, frozenset(split.wide), split.modules)
    layers = walk_layers(build_skeleton(contents.folder))
    shapes = {name: tuple(layer.weight.shape) for name, layer in layers if isinstance(layer, nn.Linear)}  # type: ignore[union-attr]
    wanted = layers_to_round(contents) & shapes.keys()
    floats = [name for name in shapes if name not in wanted]
    caught = [name for name in floats if any(skips([name], other) for other in wanted)]
    if caught:
        reporter.notice(
            f"{', '.join(caught)} of {contents.name} would stay floating point, but the format cannot tell them from "
            "others by their names: they are rounded too."
        )
    rounded = {name: shape for name, shape in shapes.items() if name in wanted or name in caught}
    return Choice(rounded, [name for name in floats if name not in caught])


def skips_by_path(names: Collection[str], layer: str) -> bool:
    """The rule of most of diffusers' loaders: a name stands for the layer, for all below it, and, if it has no dots,
    for every layer that is called so in its own parent."""
    return layer.rpartition(".")[2] in names or any(name == layer or f"{name}." in layer for name in names)


def skips_by_last_part(names: Collection[str], layer: str) -> bool:
    """The rule of the quanto loader: names of layers in their own parents."""
    return layer.rpartition(".")[2] in {name.rpartition(".")[2] for name in names}


def has_rows(layer: StoredLayer) -> bool:
    """Whether the codes of a layer are rows of integers with one scale each."""
    scheme = layer.scheme
    whole = scheme.group_size is None or scheme.two_level
    return (
        scheme.format == "integer" and scheme.symmetric and whole and not scheme.split and not scheme.absorbs_outliers
    )


def rows_of(contents: Contents, name: str) -> tuple[Tensor, Tensor]:
    """Codes (O, K) int8 and scales (O, 1) float32 of a linear."""
    layer = contents.layers.get(name)
    if layer is not None and has_rows(layer):
        weight = layer.load()
        return integer_rows(weight.qweight, weight.group_scale, layer.scheme, layer.shape[1]), weight.scale.float()
    return round_rows(contents.load(f"{name}.weight").float())


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of the nearest rows; a row of zeros has the scale 1."""
    largest = weight.abs().amax(1, keepdim=True)
    scale = torch.where(largest == 0, 1.0, largest / LARGEST)
    return (weight / scale).round().clamp(-LARGEST, LARGEST).to(torch.int8), scale


def float_tensors(contents: Contents, choice: Choice, dtype: str) -> dict[str, Writable]:
    """Everything but the weights of the linears that are rounded, floats in one type."""
    found: dict[str, Writable] = {}
    for name, shape in contents.shapes().items():
        layer, _, part = name.rpartition(".")
        if layer in choice.rounded and part == "weight":
            continue
        wanted = "F32" if dtype == "F16" and layer in choice.wide else dtype
        stored = contents.floats.get(name)
        if stored is not None:
            found[name] = stored.to(wanted) if stored.dtype in FLOATS else stored
        else:
            found[name] = LazyTensor(shape, wanted, lambda name=name: contents.load(name))  # type: ignore[misc]
    return found


def write_config(contents: Contents, folder: Path, quantization: Mapping[str, Any], dtype: str) -> None:
    """Write config.json with what a loader needs to know of the tensors.

    Args:
        quantization: its quantization_config.
        dtype: type of the floats; transformers loads a model in it unless it is told another one.
    """
    config = {**contents.config, "quantization_config": quantization}
    if contents.is_text_encoder:
        config.pop("torch_dtype", None)  # the name of the field before version 5
        config["dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def count_kept(contents: Contents, rounded: Mapping[str, object], keeps: Callable[[StoredLayer], bool]) -> int:
    """How many of the layers keep the codes that they have."""
    return sum(name in contents.layers and keeps(contents.layers[name]) for name in rounded)


def tell_rounded(contents: Contents, rounded: Mapping[str, object], kept: int, reporter: Reporter) -> None:
    """Say how many layers of a bundle lost their own codes."""
    reporter.say(f"export {contents.name}: {len(rounded)} linears, {kept} with the codes of the bundle")
    if contents.layers and kept < len(rounded):
        reporter.notice(
            f"{len(rounded) - kept} linears of {contents.name} have other numbers than this format's and were rounded "
            "once more."
        )
