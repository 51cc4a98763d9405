"""Quantize a component with a method that looks at what enters its layers.

Units are treated in the order in which they run; each sees the inputs that the treated units before it give, so that a
later unit can make up for earlier ones. The float network is in memory as a whole, in float32; methods that compare
blocks have a second one, which stays as it is and tells what every unit should give.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..core.bundle import BundleWriter
from ..core.config import Config
from ..core.errors import UnsupportedError
from ..core.families import Family
from ..core.manifest import ModuleRecord
from ..core.reporter import Reporter
from ..core.scheme import Scheme
from ..core.seeds import named_seed
from ..runtime.trajectory import DenoiserCall
from .block import Block, Sighting, Treated, outputs_of
from .checkpoint import Checkpoint
from .groupwise import treat_groups
from .held import calls_within
from .layerwise import treat_layers, weight_error_of
from .plan import LayerPlan
from .ranges import dynamic_roundings, with_scales
from .simulate import RoundedInputs, branch_of, on_smoothed, put_bias_, put_weight_, rounding_of
from .units import Unit, find_units
from .walk import UnitInput, Walk


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

    def key(self, plan: LayerPlan) -> str:
        """Name of a layer in the journal."""
        return f"{self.component}/{plan.name}"

    def is_finished(self, plans: Sequence[LayerPlan]) -> bool:
        return {self.key(plan) for plan in plans} <= self.writer.finished_units()


def quantize_units(
    treatment: Treatment,
    model: nn.Module,
    plans: list[LayerPlan],
    family: Family,
    calls: Sequence[DenoiserCall],
    reporter: Reporter,
) -> dict[str, int | float | str]:
    """Quantize every planned layer of `model` into the writer.

    Args:
        model: the float network; its weights and hooks are changed.
        calls: what enters it, from a calibration set.

    Returns:
        What the method decided by itself, for the manifest.
    """
    method, planned = treatment.method, [plan for plan in plans if plan.scheme]
    reference = copy.deepcopy(model) if method.UNIT == "block" else None  # before anything is put into the model
    rounding = RoundedInputs(model, {plan.name: plan.scheme for plan in planned if plan.scheme})
    chosen: dict[str, int | float | str] = {}
    if method.UNIT == "block":
        chosen = _decided(
            treatment,
            lambda: method.decide(
                model, find_units(model, planned, family, calls[0]), calls, treatment.config, reporter
            ),
        )
    if hasattr(method, "temporal_block"):
        if block := method.temporal_block(model, planned, family, calls, rounding, treatment.seed):
            _finish_unit(treatment, block, chosen)
            planned = [plan for plan in planned if plan not in block.plans]
        else:
            reporter.notice(f"{family.name}: no layers that depend on the time alone were found; none is treated apart")
    units = find_units(model, planned, family, calls[0])
    walking = calls_within(
        treatment.cache_gb,
        model,
        calls,
        [unit.name for unit in units],
        walks=2 if method.UNIT == "block" else 1,
        seed=treatment.seed,
        reporter=reporter,
    )
    _tell_of_steps(planned, walking, reporter)
    for block in reporter.progress(
        _blocks(treatment, model, reference, units, walking, rounding), f"quantize {treatment.component}", len(units)
    ):
        _finish_unit(treatment, block, chosen)
    if hasattr(method, "finish"):
        _finish_model(treatment, model, [plan for plan in plans if plan.scheme], calls, rounding, chosen, reporter)
    multiplying = [plan for plan in plans if not isinstance(model.get_submodule(plan.name), nn.Embedding)]
    _tell_of_baselines(treatment, multiplying, reporter)
    return chosen


def _blocks(
    treatment: Treatment,
    model: nn.Module,
    reference: nn.Module | None,
    units: list[Unit],
    calls: Sequence[DenoiserCall],
    rounding: RoundedInputs,
) -> Iterator[Block]:
    """The units, one after the other, each with what enters it when all before it are quantized."""
    names = [unit.name for unit in units]
    with ExitStack() as stack:
        walk = stack.enter_context(Walk(model, calls, names))
        float_walk = stack.enter_context(Walk(reference, calls, names)) if reference else None
        for unit in units:
            finished = treatment.is_finished(unit.plans)
            sightings = [] if finished else _sightings(unit, calls, walk, reference, float_walk)
            seed = named_seed(treatment.seed, unit.name)
            intact = reference.get_submodule(unit.name) if reference else None
            yield Block(unit.name, model.get_submodule(unit.name), unit.plans, sightings, rounding, seed, intact)


@torch.no_grad()
def _sightings(
    unit: Unit, calls: Sequence[DenoiserCall], walk: Walk, reference: nn.Module | None, float_walk: Walk | None
) -> list[Sighting]:
    """What enters the unit in every call in which it runs, and what it gives in the float network."""
    wanted = float_walk.advance(unit.name) if float_walk else [None] * len(calls)
    found = []
    for call, entering, intact in zip(calls, walk.advance(unit.name), wanted, strict=True):
        if entering is None:
            continue
        target = None
        if reference is not None and intact is not None:
            target = outputs_of(reference.get_submodule(unit.name)(*intact.args, **intact.kwargs))
        found.append(Sighting(call.state, entering, target, intact))
    return found


def _finish_unit(treatment: Treatment, block: Block, chosen: dict[str, Any]) -> None:
    """Treat the unit unless an earlier run did, store it, and let the network compute with it."""
    if not treatment.is_finished(block.plans):
        treated = _treat(treatment, block, chosen)
        for plan in block.plans:
            _store(treatment, plan, block.layers[plan.name], treated[plan.name])
    for plan in block.plans:
        _put_stored(treatment, plan, block.layers[plan.name], block.rounding)


def _treat(treatment: Treatment, block: Block, chosen: dict[str, Any]) -> dict[str, Treated]:
    method, config = treatment.method, treatment.config
    if method.UNIT == "block":
        found: dict[str, Treated] = method.treat(block, config, chosen)
        return found
    if method.UNIT == "group":
        return treat_groups(block, method, config)
    with block.rounding.instead(dynamic_roundings(block)):
        treated = treat_layers(block, method, config)
    return with_scales(block, treated, method.act_search(config))


def _finish_model(
    treatment: Treatment,
    model: nn.Module,
    plans: list[LayerPlan],
    calls: Sequence[DenoiserCall],
    rounding: RoundedInputs,
    chosen: dict[str, Any],
    reporter: Reporter,
) -> None:
    """Let a method that trains the whole network go on from what it made of the units."""
    done = f"trained:{treatment.component}"
    reference = load_float(treatment.folder, model)
    if done in treatment.writer.finished_units():
        for notice in treatment.writer.unit_record(done)["notices"]:  # of the training, as if it were now
            reporter.notice(notice)
    else:
        earlier = len(reporter.notices)
        trained = _train_model(treatment, model, reference, plans, calls, rounding, chosen, reporter)
        entries = {plan.name: _entry(plan, reference.get_submodule(plan.name), trained[plan.name]) for plan in plans}
        tensors = {key: value for named, _ in entries.values() for key, value in named.items()}
        layers = {name: record for name, (_, record) in entries.items()}
        treatment.writer.save_unit(done, tensors, {"layers": layers, "notices": list(reporter.notices[earlier:])})
    # all together first: a run that stops between two of these would else train on from a mixture
    records = treatment.writer.unit_record(done)["layers"]
    stored = treatment.writer.unit_tensors(done)
    for plan in plans:
        named = {key: kept.load() for key, kept in stored.items() if key.rpartition(".")[0] == plan.name}
        treatment.writer.save_unit(treatment.key(plan), named, records[plan.name])
        _put_stored(treatment, plan, model.get_submodule(plan.name), rounding)


def _train_model(
    treatment: Treatment,
    model: nn.Module,
    reference: nn.Module,
    plans: list[LayerPlan],
    calls: Sequence[DenoiserCall],
    rounding: RoundedInputs,
    chosen: dict[str, Any],
    reporter: Reporter,
) -> dict[str, Treated]:
    """What the method makes of the network as a whole; the units that it starts from are in the journal."""
    sightings = [
        Sighting(call.state, UnitInput(call.args, call.kwargs), outputs_of(call.replay(reference)))
        for call in reporter.progress(calls, "float outputs")
    ]
    block = Block("", model, tuple(plans), sightings, rounding, named_seed(treatment.seed, "model"), reference)
    starts = {plan.name: _stored(treatment, plan) for plan in plans}
    checkpoint = Checkpoint(treatment.writer, f"training:{treatment.component}")
    found: dict[str, Treated] = treatment.method.finish(block, starts, treatment.config, chosen, checkpoint, reporter)
    return found


def _decided(treatment: Treatment, decide: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the method decides for the whole model, the same again when an interrupted run goes on."""
    key = f"{treatment.component}/"
    if key not in treatment.writer.finished_units():
        treatment.writer.save_unit(key, {}, decide())
    return dict(treatment.writer.unit_record(key))


def _store(treatment: Treatment, plan: LayerPlan, layer: nn.Module, treated: Treated) -> None:
    treatment.writer.save_unit(treatment.key(plan), *_entry(plan, layer, treated))


def _entry(plan: LayerPlan, layer: nn.Module, treated: Treated) -> tuple[dict[str, Tensor], dict[str, Any]]:
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
    return {f"{plan.name}.{key}": value for key, value in tensors.items()}, record.model_dump()


def _stored(treatment: Treatment, plan: LayerPlan) -> Treated:
    """A layer as the journal holds it."""
    key = treatment.key(plan)
    found = {name.rpartition(".")[2]: kept.load() for name, kept in treatment.writer.unit_tensors(key).items()}
    record = treatment.writer.unit_record(key)
    scheme = Scheme.from_name(record["scheme"])  # the planned one, or what the method made of it
    return Treated.from_tensors(found, scheme, plan.shape, method=record["method"], output_error=record["output_error"])


def _put_stored(treatment: Treatment, plan: LayerPlan, layer: nn.Module, rounding: RoundedInputs) -> None:
    """Let the network compute with a layer as the journal holds it."""
    stored = _stored(treatment, plan)
    put_weight_(layer, stored.weight)
    put_bias_(layer, stored.bias)
    rounded = rounding_of(stored.weight.scheme, layer, stored.acts)
    rounding.put(plan.name, on_smoothed(rounded, stored.weight.smoothing), branch_of(stored.weight))


def _tell_of_steps(plans: list[LayerPlan], calls: Sequence[DenoiserCall], reporter: Reporter) -> None:
    """Scales of every step need every step."""
    steps = next((plan.scheme.act_steps for plan in plans if plan.scheme and plan.scheme.act_steps), None)
    if steps is None:
        return
    if any(call.state and call.state.calls != steps for call in calls):
        raise UnsupportedError(
            "this denoiser is called on another grid than the one that the calibration set names.",
            "A table of scales for every step belongs to one grid.",
            "Use --act-mode static.",
        )
    if missing := steps - len({call.state.call for call in calls if call.state}):
        reporter.notice(
            f"the calibration set lacks {missing} of the {steps} steps: they take the scales of the nearest one."
        )


def _tell_of_baselines(treatment: Treatment, plans: list[LayerPlan], reporter: Reporter) -> None:
    """Which layers were rounded to nearest instead, and why; from the journal, so that a resumed run says the same.

    Embeddings are no news: a table that is looked up has nothing better than the nearest values.
    """
    records = {plan.name: treatment.writer.unit_record(treatment.key(plan)) for plan in plans if plan.scheme}
    fallen = {name: record for name, record in records.items() if record["method"]}
    method = treatment.method.__name__.rpartition(".")[2]
    if blind := [name for name, record in fallen.items() if record["output_error"] is None]:
        reporter.notice(f"{method} cannot use what enters these layers; rounded to nearest: {list_names(blind)}.")
    if lost := [name for name, record in fallen.items() if record["output_error"] is not None]:
        reporter.notice(f"{method} was no better than rounding to nearest, which was kept, on {list_names(lost)}.")


def six_digits(value: float) -> float:
    """So that reports of two machines agree."""
    return float(f"{value:.6g}")


def list_names(names: list[str]) -> str:
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
