"""Quantize a component with a method that looks at what enters its layers.

Units are treated in the order in which they run; each sees the inputs that the treated units before it give, so that a
later unit can make up for earlier ones. The float network is in memory as a whole, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..core.bundle import BundleWriter
from ..core.config import Config
from ..core.errors import CalibrationError
from ..core.families import Family
from ..core.manifest import ModuleRecord
from ..core.reporter import Reporter
from ..runtime.trajectory import DenoiserCall
from ..runtime.weight import QuantizedWeight, to_rows
from .grams import Grams, has_grams
from .methods import rtn
from .plan import LayerPlan
from .simulate import RoundedInputs, put_weight_
from .units import Unit, find_units
from .walk import UnitInput, Walk

ROWS = 32768  # rows of x that one layer's statistics are taken from; more: steadier, slower
BASELINE = rtn.RTNConfig(search="mse")


@dataclass(frozen=True)
class Treatment:
    """How the layers of one component are to be quantized."""

    component: str
    method: ModuleType
    config: Config  # the method's own
    writer: BundleWriter

    def key(self, plan: LayerPlan) -> str:
        """Name of a layer in the journal."""
        return f"{self.component}/{plan.name}"

    def is_finished(self, unit: Unit) -> bool:
        return {self.key(plan) for plan in unit.plans} <= self.writer.finished_units()


@torch.no_grad()
def quantize_units(
    treatment: Treatment,
    model: nn.Module,
    plans: list[LayerPlan],
    family: Family,
    calls: Sequence[DenoiserCall],
    reporter: Reporter,
) -> None:
    """Quantize every planned layer of `model` into the writer.

    Args:
        model: the float network; its weights and hooks are changed.
        calls: what enters it, from a calibration set.
    """
    rounded = RoundedInputs(model, {plan.name: plan.scheme for plan in plans if plan.scheme})
    units = find_units(model, plans, family, calls[0])
    with Walk(model, calls, [unit.name for unit in units]) as walk:
        for unit in reporter.progress(units, f"quantize {treatment.component}"):
            for plan in unit.plans:
                rounded.switch_on(plan.name)
            if not treatment.is_finished(unit):
                _quantize_unit(treatment, model, unit, walk.advance(unit.name), len(calls))
            for plan in unit.plans:
                put_weight_(model.get_submodule(plan.name), _stored(treatment, plan))
    multiplying = [plan for plan in plans if not isinstance(model.get_submodule(plan.name), nn.Embedding)]
    _tell_of_baselines(treatment, multiplying, reporter)


def _tell_of_baselines(treatment: Treatment, plans: list[LayerPlan], reporter: Reporter) -> None:
    """Which layers were rounded to nearest instead, and why; from the journal, so that a resumed run says the same.

    Embeddings are no news: a table that is looked up has nothing better than the nearest values.
    """
    records = {plan.name: treatment.writer.unit_record(treatment.key(plan)) for plan in plans if plan.scheme}
    fallen = {name: record for name, record in records.items() if record["method"]}
    method = treatment.method.__name__.rpartition(".")[2]
    if blind := [name for name, record in fallen.items() if record["output_error"] is None]:
        reporter.notice(f"{method} cannot use what enters these layers; rounded to nearest: {_list(blind)}.")
    if lost := [name for name, record in fallen.items() if record["output_error"] is not None]:
        reporter.notice(f"{method} was no better than rounding to nearest, which was kept, on {_list(lost)}.")


def _quantize_unit(
    treatment: Treatment, model: nn.Module, unit: Unit, inputs: list[UnitInput | None], calls: int
) -> None:
    """Gather what enters the layers of one unit, then quantize and store them."""
    layers = {plan.name: model.get_submodule(plan.name) for plan in unit.plans}
    module = model.get_submodule(unit.name)
    seeing = {name: layer for name, layer in layers.items() if has_grams(layer)}
    with Grams(seeing, rows_per_call=max(1, ROWS // calls)) as grams:
        for entering in inputs:
            if entering is not None:
                module(*entering.args, **entering.kwargs)
    for plan in unit.plans:
        weight: Tensor = layers[plan.name].weight  # type: ignore[assignment]
        _quantize_layer(treatment, plan, weight, grams.mean(plan.name))


def _quantize_layer(treatment: Treatment, plan: LayerPlan, weight: Tensor, gram: Tensor | None) -> None:
    """By the method, or to nearest where the method sees nothing or is no better on the inputs that it saw."""
    assert plan.scheme is not None
    method: str | None = "rtn"
    chosen, output_error = rtn.quantize(weight, plan.scheme, BASELINE), None
    if gram is not None:
        _check_finite(plan.name, gram)
        output_error = output_error_of(weight, chosen, gram)
        found = treatment.method.quantize(weight, plan.scheme, treatment.config, gram)
        if (error := output_error_of(weight, found, gram)) < output_error:
            chosen, method, output_error = found, None, error
    record = ModuleRecord(
        scheme=plan.scheme.name,
        shape=plan.shape,
        error=six_digits(weight_error_of(weight, chosen)),
        method=method,
        output_error=None if output_error is None else six_digits(output_error),
    )
    tensors = {f"{plan.name}.{key}": value for key, value in chosen.tensors().items()}
    treatment.writer.save_unit(treatment.key(plan), tensors, record.model_dump())


def _check_finite(name: str, gram: Tensor) -> None:
    if not bool(gram.isfinite().all()):
        raise CalibrationError(
            f"what enters {name} holds NaN or infinity.",
            "The float network overflows on this calibration set.",
            "See whether the float pipeline makes images from the same inputs; calibrate with others.",
        )


def output_error_of(weight: Tensor, quantized: QuantizedWeight, gram: Tensor) -> float:
    """||(W - W^) x|| / ||W x|| over the inputs x behind a gram matrix (K, K)."""
    rows, difference = to_rows(weight).float(), to_rows(quantized.dequantize() - weight.float())
    power = ((rows @ gram) * rows).sum()
    return float((((difference @ gram) * difference).sum() / power.clamp(min=1e-30)).clamp(min=0).sqrt())


def weight_error_of(weight: Tensor, quantized: QuantizedWeight) -> float:
    """||W - W^|| / ||W||: the relative output error for white-noise inputs."""
    norm = float(weight.float().norm())
    return float((quantized.dequantize() - weight.float()).norm()) / norm if norm > 0 else 0.0


def six_digits(value: float) -> float:
    """So that reports of two machines agree."""
    return float(f"{value:.6g}")


def _stored(treatment: Treatment, plan: LayerPlan) -> QuantizedWeight:
    """A layer as the journal holds it."""
    assert plan.scheme is not None
    tensors = {
        key.rpartition(".")[2]: tensor.load()
        for key, tensor in treatment.writer.unit_tensors(treatment.key(plan)).items()
    }
    return QuantizedWeight(plan.scheme, plan.shape, **tensors)


def _list(names: list[str]) -> str:
    """The first few names."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def load_float(folder: Path, skeleton: nn.Module) -> nn.Module:
    """The component's network with its weights in float32."""
    model: Any = type(skeleton).from_pretrained(  # type: ignore[attr-defined]
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
    )
    network: nn.Module = model.eval().requires_grad_(False)
    return network
