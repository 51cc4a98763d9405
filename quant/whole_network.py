"""Train what was made of the units, as one network: for methods that have a `finish`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..core.reporter import Reporter
from ..core.seeds import named_seed
from ..runtime.trajectory import DenoiserCall
from .block import Block, Sighting, Treated, outputs_of
from .checkpoint import Checkpoint
from .held import calls_to_train_on
from .plan import LayerPlan
from .simulate import RoundedInputs
from .treatment import Treatment, entry
from .walk import UnitInput


def finish_model(
    treatment: Treatment,
    model: nn.Module,
    reference: nn.Module,
    plans: Sequence[LayerPlan],
    calls: Sequence[DenoiserCall],
    rounding: RoundedInputs,
    chosen: dict[str, Any],
    reporter: Reporter,
) -> None:
    """Let a method that trains the whole network go on from what it made of the units.

    Args:
        reference: the float network.
        calls: what enters it; of these as many are trained on as fit into the budget.
    """
    done = f"trained:{treatment.component}"
    if done in treatment.writer.finished_units():
        for notice in treatment.writer.unit_record(done)["notices"]:  # of the training, as if it were now
            reporter.notice(notice)
    else:
        earlier = len(reporter.notices)
        trained = _train_model(treatment, model, reference, plans, calls, rounding, chosen, reporter)
        entries = {plan.name: entry(plan, reference.get_submodule(plan.name), trained[plan.name]) for plan in plans}
        tensors = {key: value for named, _ in entries.values() for key, value in named.items()}
        layers = {name: record for name, (_, record) in entries.items()}
        treatment.writer.save_unit(done, tensors, {"layers": layers, "notices": list(reporter.notices[earlier:])})
    # all together first: a run that stops between two of these would else train on from a mixture
    records = treatment.writer.unit_record(done)["layers"]
    stored = treatment.writer.unit_tensors(done)
    for plan in plans:
        named = {key: kept.load() for key, kept in stored.items() if key.rpartition(".")[0] == plan.name}
        treatment.writer.save_unit(treatment.key(plan), named, records[plan.name])
        treatment.put_stored(plan, model.get_submodule(plan.name), rounding)


def _train_model(
    treatment: Treatment,
    model: nn.Module,
    reference: nn.Module,
    plans: Sequence[LayerPlan],
    calls: Sequence[DenoiserCall],
    rounding: RoundedInputs,
    chosen: dict[str, Any],
    reporter: Reporter,
) -> dict[str, Treated]:
    """What the method makes of the network as a whole; the units that it starts from are in the journal."""
    weights = _call_weights(treatment)
    seed = named_seed(treatment.seed, "model")
    held = calls_to_train_on(treatment.cache_gb, reference, calls, seed=seed, reporter=reporter)
    sightings = [
        Sighting(
            call.state,
            UnitInput(call.args, call.kwargs),
            outputs_of(call.replay(reference)),
            weight=weights[call.state.call] if weights and call.state else 1.0,
        )
        for call in reporter.progress(held, "float outputs")
    ]
    block = Block("", model, tuple(plans), sightings, rounding, seed, reference)
    starts = {plan.name: treatment.stored(plan) for plan in plans}
    checkpoint = Checkpoint(treatment.writer, f"training:{treatment.component}")
    found: dict[str, Treated] = treatment.method.finish(block, starts, treatment.config, chosen, checkpoint, reporter)
    return found


def _call_weights(treatment: Treatment) -> list[float] | None:
    """For every call of the grid its weight in the loss, 1 on the mean; None for equal ones."""
    if getattr(treatment.config, "weigh", "equally") == "equally":
        return None
    assert treatment.sensitivity is not None
    key = f"sensitivity:{treatment.component}"
    if key not in treatment.writer.finished_units():
        treatment.writer.save_unit(key, {}, {"calls": treatment.sensitivity()})
    found: list[float] = treatment.writer.unit_record(key)["calls"]
    return [value * len(found) / sum(found) for value in found]
