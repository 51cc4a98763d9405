"""What a calibrated pass does to one component, and what it has done: treated layers, in the journal and in the model.

A layer goes into the journal first and from there into the model, so that a resumed run computes with the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..core.bundle import BundleWriter
from ..core.config import Config
from ..core.manifest import ModuleRecord
from ..core.reporter import Reporter
from ..core.scheme import Scheme
from .block import Treated
from .layerwise import weight_error_of
from .plan import LayerPlan
from .simulate import RoundedInputs, branch_of, channel_axis, put_bias_, put_weight_, rounding_before, rounding_of

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Treatment:
    """How the layers of one component are to be quantized."""

    component: str
    method: ModuleType
    config: Config  # the method's own
    writer: BundleWriter
    folder: Path  # of the float component
    seed: int = 0
    cache_gb: float = 4.0
    sensitivity: Callable[[], list[float]] | None = None  # measures it for every call of the grid of the calibration
    device: torch.device = CPU  # of the network

    def key(self, plan: LayerPlan) -> str:
        """Name of a layer in the journal."""
        return f"{self.component}/{plan.name}"

    def is_finished(self, plans: Sequence[LayerPlan]) -> bool:
        return {self.key(plan) for plan in plans} <= self.writer.finished_units()

    def store(self, plan: LayerPlan, layer: nn.Module, treated: Treated) -> None:
        """Put a layer into the journal.

        Args:
            layer: the float one.
        """
        self.writer.save_unit(self.key(plan), *entry(plan, layer, treated))

    def stored(self, plan: LayerPlan) -> Treated:
        """A layer as the journal holds it."""
        key = self.key(plan)
        found = {name.rpartition(".")[2]: kept.load() for name, kept in self.writer.unit_tensors(key).items()}
        record = self.writer.unit_record(key)
        scheme = Scheme.from_name(record["scheme"])  # the planned one, or what the method made of it
        found = {name: values.to(self.device) for name, values in found.items()}
        return Treated.from_tensors(
            found, scheme, plan.shape, method=record["method"], output_error=record["output_error"]
        )

    def put_stored(self, plan: LayerPlan, layer: nn.Module, rounding: RoundedInputs) -> None:
        """Let the network compute with a layer as the journal holds it."""
        stored = self.stored(plan)
        put_weight_(layer, stored.weight)
        put_bias_(layer, stored.bias)
        rounded = rounding_of(stored.weight.scheme, layer, stored.acts)
        around = rounding_before(stored.weight, rounded, channel_axis(layer))
        rounding.put(plan.name, around, branch_of(stored.weight))

    def decided(self, decide: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the method decides for the whole model, the same again when an interrupted run goes on."""
        key = f"{self.component}/"
        if key not in self.writer.finished_units():
            self.writer.save_unit(key, {}, decide())
        return dict(self.writer.unit_record(key))


def entry(plan: LayerPlan, layer: nn.Module, treated: Treated) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record of a layer in the journal.

    Args:
        layer: the float one.
    """
    own: Tensor = layer.weight  # type: ignore[assignment]
    record = ModuleRecord(
        scheme=treated.weight.scheme.name,
        shape=plan.shape,
        error=six_digits(weight_error_of(own, treated.weight)),
        method=treated.method,
        output_error=None if treated.output_error is None else six_digits(treated.output_error),
    )
    tensors = treated.tensors()
    return {f"{plan.name}.{key}": value.cpu() for key, value in tensors.items()}, record.model_dump()


def six_digits(value: float) -> float:
    """So that reports of two machines agree."""
    return float(f"{value:.6g}")


def treating_device(target: torch.device, method: str, reporter: Reporter) -> torch.device:
    """Where the layers are treated: second moments are inverted in float64, which Apple's GPUs do not have."""
    if target.type != "mps":
        return target
    reporter.say(f"{method} treats the layers on the CPU: {target} has no float64")
    return CPU


def load_float(folder: Path, skeleton: nn.Module, device: torch.device = CPU) -> nn.Module:
    """The component's network with its weights in float32."""
    model: Any = type(skeleton).from_pretrained(  # type: ignore[attr-defined]
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
    )
    network: nn.Module = model.eval().requires_grad_(False).to(device)
    return network
