"""What a pipeline is made of: components, sizes, work per denoiser call, where its time goes, and what quantizing could
save. Runs the real pipeline for two steps to see what enters the denoiser."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import nn

from ..core.config import Config, Document
from ..core.errors import UnsupportedError
from ..core.families import find_family
from ..core.manifest import ComponentRecord, Manifest, read_manifest
from ..core.pipeline import denoisers, walk_layers
from ..core.reporter import Reporter, silent
from ..core.safe_read import component_tensors
from ..core.scheme import Scheme
from ..core.source import Source, component_entries, resolve_source, zoo_entry_of
from ..core.target import execution_of
from ..runtime.here import target_here
from ..runtime.load import load_source, pick_device
from ..runtime.request import RunRequest
from ..runtime.trajectory import capture_calls
from ..runtime.weight import state_shapes
from .profile import BlockCost, profile_call
from .size import bytes_on_disk

GROUP_SIZE = 64  # input features per scale assumed for 4 bits
SHOWN = {"--bits 4": "w4", "--bits 8 --act-bits 8": "w8a8", "--bits 4 --act-bits 4": "w4a4"}
PROBE_STEPS = 2  # some solvers cannot do one


class Quantizable(Config):
    """Layers of one kind that quantize could treat, all at the same width; estimates without low-rank parts."""

    layers: int
    parameters: int
    bytes_now: int  # in the weight files
    bytes_at_8_bits: int  # one scale per channel
    bytes_at_4_bits: int  # one scale and zero point per 64 inputs; layers of time and class stay at 8 bits


class Component(Config):
    """One part of the pipeline."""

    library: str
    class_name: str
    is_denoiser: bool = False
    parameters: int = 0
    bytes_on_disk: int = 0
    macs_per_call: int | None = None  # for one image, both guidance branches included
    seconds_per_call: float | None = None  # median
    blocks: tuple[BlockCost, ...] = ()
    quantizable: dict[str, Quantizable] = Field(default_factory=dict)  # kind of layer -> what could be saved
    pruning: str | None = None  # method and what is left, when blocks were removed
    quantization: str | None = None  # method and schemes, when it is quantized already


class Inspection(Document):
    """One pipeline."""

    name: str
    identity: str
    kind: str  # folder, bundle, hub, zoo
    pipeline: str
    scheduler: str | None
    passes: tuple[str, ...]  # commands that made it, oldest first
    components: dict[str, Component]
    products: dict[str, str] = Field(default_factory=dict)  # options of quantize -> what they run as on this machine
    absent: tuple[str, ...] = ()  # what was not measured, and why


def inspect_pipeline(
    source: str | Path | Source | None, *, device: str = "auto", reporter: Reporter | None = None
) -> Inspection:
    """Look at a pipeline without changing it.

    Raises:
        ModelError: the source is missing or not a pipeline.
        BundleError: the bundle is damaged.
    """
    reporter = reporter or silent()
    found = source if isinstance(source, Source) else resolve_source(str(source) if source else None, reporter=reporter)
    manifest = read_manifest(found.path)
    pipe: Any = load_source(found, device=device, cached=False, reporter=reporter)
    components = {
        name: _component(name, entry, pipe, found, manifest) for name, entry in component_entries(found.path).items()
    }
    costs, absent = _denoiser_costs(pipe, found)
    for name, cost in costs.items():
        components[name] = components[name].model_copy(update=cost)
    return Inspection(
        name=found.name,
        identity=found.identity,
        kind=found.kind,
        pipeline=type(pipe).__name__,
        scheduler=type(pipe.scheduler).__name__ if getattr(pipe, "scheduler", None) else None,
        passes=tuple(step.command for step in manifest.passes) if manifest else (),
        components=components,
        products=_products(pick_device(device)),
        absent=absent,
    )


def _products(device: torch.device) -> dict[str, str]:
    """What quantized layers would run as where the pipeline was run."""
    target = target_here(device)
    if target is None:
        return {}
    return {options: execution_of(Scheme.from_name(name), target).sentence for options, name in SHOWN.items()}


def quantizable_layers(denoiser: nn.Module, stored: dict[str, int]) -> dict[str, Quantizable]:
    """Kind of layer -> what quantizing all layers of that kind would save. First and last layers stay float.

    Args:
        stored: bytes of every tensor in the weight files.
    """
    family, _ = find_family(type(denoiser).__name__)
    rows: dict[str, list[tuple[int, ...]]] = {}
    for name, layer in walk_layers(denoiser):
        role = family.role(name)
        if role == "edge" or f"{name}.weight" not in stored:
            continue
        shape: tuple[int, ...] = tuple(layer.weight.shape)  # type: ignore[arg-type]
        eight = _stored_bytes(shape, 8)
        narrow = role != "temporal" and not isinstance(layer, nn.Embedding)
        row = (1, prod(shape), stored[f"{name}.weight"], eight, _stored_bytes(shape, 4) if narrow else eight)
        rows.setdefault(_kind(layer), []).append(row)
    fields = tuple(Quantizable.model_fields)
    return {
        kind: Quantizable(**dict(zip(fields, map(sum, zip(*layers, strict=True)), strict=True)))
        for kind, layers in sorted(rows.items())
    }


def _component(name: str, entry: tuple[str, str], pipe: Any, source: Source, manifest: Manifest | None) -> Component:
    library, class_name = entry
    module = pipe.components.get(name)
    if not isinstance(module, nn.Module):
        return Component(library=library, class_name=class_name)
    record = manifest.components.get(name) if manifest else None
    quantization = record.quantization if record else None
    is_denoiser = name in denoisers(pipe)
    tensors = {key: info for key, (_, info) in component_tensors(source.path / name).items()}
    return Component(
        library=library,
        class_name=class_name,
        is_denoiser=is_denoiser,
        parameters=record.parameters if record else sum(prod(info.shape) for info in tensors.values()),
        bytes_on_disk=bytes_on_disk(source.path / name),
        quantizable=quantizable_layers(module, {key: info.end - info.start for key, info in tensors.items()})
        if is_denoiser and not quantization
        else {},
        pruning=_pruning(record),
        quantization=f"{quantization.method}: {', '.join(sorted(quantization.schemes))}" if quantization else None,
    )


def _pruning(record: ComponentRecord | None) -> str | None:
    pruning = record.pruning if record else None
    if pruning is None:
        return None
    share = pruning.parameters_after / pruning.parameters_before
    gone = [name for name, unit in pruning.units.items() if unit.removed]
    return f"{pruning.method}: {share:.3f} of the parameters, without {', '.join(gone)}"


def _denoiser_costs(pipe: Any, source: Source) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """Denoiser name -> its measured fields, and why some are missing."""
    request = RunRequest(seeds=(0,), num_inference_steps=PROBE_STEPS).with_zoo_defaults(zoo_entry_of(source))
    try:
        calls = {call.component: call for call in reversed(capture_calls(pipe, request))}
    except UnsupportedError as error:
        return {}, (f"work and time per call: {error}",)
    modules = denoisers(pipe)
    missing = tuple(f"{name}: it was not called in {PROBE_STEPS} steps." for name in modules if name not in calls)
    return {name: profile_call(modules[name], call) for name, call in calls.items()}, missing


def _stored_bytes(shape: tuple[int, ...], bits: int) -> int:
    features = prod(shape[1:])
    grouped = bits < 8 and features % GROUP_SIZE == 0
    scheme = Scheme(bits=bits, symmetric=not grouped, group_size=GROUP_SIZE if grouped else None)
    return sum(prod(size) * (dtype.itemsize if dtype else 2) for size, dtype in state_shapes(scheme, shape).values())


def _kind(layer: nn.Module) -> str:
    return "embedding" if isinstance(layer, nn.Embedding) else "linear" if isinstance(layer, nn.Linear) else "conv"
