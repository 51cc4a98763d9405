"""Quantize a component with a method that looks at what enters its layers.

Units are treated in the order in which they run; each sees the inputs that the treated units before it give, so that a
later unit can make up for earlier ones. The float network is in memory as a whole, in float32; methods that compare
blocks have a second one, which stays as it is and tells what every unit should give.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.errors import UnsupportedError
from ..core.families import Family
from ..core.memory import give_back_memory
from ..core.reporter import Reporter
from ..core.seeds import named_seed
from ..runtime.trajectory import DenoiserCall
from .block import Block, Sighting, Treated, outputs_of
from .groupwise import treat_groups
from .held import calls_within
from .layerwise import treat_layers
from .paging import paged, paging_folder
from .plan import LayerPlan
from .ranges import UNSEEN, dynamic_roundings, is_guessed, with_scales
from .simulate import RoundedInputs
from .treatment import Treatment, load_float
from .units import Unit, find_units
from .walk import Walk
from .whole_network import finish_model


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
        calls: what enters it, from a calibration set; of one on the disk only those that fit are held.

    Returns:
        What the method decided by itself, for the manifest.
    """
    method, planned = treatment.method, [plan for plan in plans if plan.scheme]
    reference = copy.deepcopy(model) if method.UNIT == "block" else None  # before anything is put into the model
    rounding = RoundedInputs(model, {plan.name: plan.scheme for plan in planned if plan.scheme})
    chosen: dict[str, int | float | str] = {}
    if method.UNIT == "block":
        chosen = treatment.decided(
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
    walking, held = calls_within(
        treatment.cache_gb,
        model,
        calls,
        [unit.name for unit in units],
        walks=2 if method.UNIT == "block" else 1,
        seed=treatment.seed,
        reporter=reporter,
    )
    _tell_of_steps(planned, walking, reporter)
    on_cpu = treatment.device.type == "cpu"
    folder = paging_folder(held, treatment.writer.folder, reporter) if on_cpu else None
    for block in reporter.progress(
        _blocks(treatment, model, reference, units, walking, rounding, folder),
        f"quantize {treatment.component}",
        len(units),
    ):
        _finish_unit(treatment, block, chosen)
    if hasattr(method, "finish"):
        whole = [plan for plan in plans if plan.scheme]
        intact = reference or load_float(treatment.folder, model, treatment.device)
        finish_model(treatment, model, intact, whole, calls, rounding, chosen, reporter)
    multiplying = [plan for plan in plans if not isinstance(model.get_submodule(plan.name), nn.Embedding)]
    _tell_of_baselines(treatment, multiplying, reporter)
    _tell_of_guesses(treatment, multiplying, reporter)
    return chosen


def _blocks(
    treatment: Treatment,
    model: nn.Module,
    reference: nn.Module | None,
    units: list[Unit],
    calls: Sequence[DenoiserCall],
    rounding: RoundedInputs,
    folder: Path | None,
) -> Iterator[Block]:
    """The units, one after the other, each with what enters it when all before it are quantized."""
    names = [unit.name for unit in units]
    with ExitStack() as stack:
        walk = stack.enter_context(Walk(model, calls, names, folder))
        float_walk = stack.enter_context(Walk(reference, calls, names, folder)) if reference else None
        for unit in units:
            finished = treatment.is_finished(unit.plans)
            sightings = [] if finished else _sightings(unit, calls, walk, reference, float_walk, folder)
            seed = named_seed(treatment.seed, unit.name)
            intact = reference.get_submodule(unit.name) if reference else None
            yield Block(unit.name, model.get_submodule(unit.name), unit.plans, sightings, rounding, seed, intact)


@torch.no_grad()
def _sightings(
    unit: Unit,
    calls: Sequence[DenoiserCall],
    walk: Walk,
    reference: nn.Module | None,
    float_walk: Walk | None,
    folder: Path | None,
) -> list[Sighting]:
    """What enters the unit in every call in which it runs, and what it gives in the float network."""
    wanted = float_walk.advance(unit.name) if float_walk else [None] * len(calls)
    found = []
    for call, entering, intact in zip(calls, walk.advance(unit.name), wanted, strict=True):
        if entering is None:
            continue
        target = None
        if reference is not None and intact is not None:
            with paged(folder):
                target = outputs_of(reference.get_submodule(unit.name)(*intact.args, **intact.kwargs))
        found.append(Sighting(call.state, entering, target, intact))
    return found


def _finish_unit(treatment: Treatment, block: Block, chosen: dict[str, Any]) -> None:
    """Treat the unit unless an earlier run did, store it, and let the network compute with it."""
    if not treatment.is_finished(block.plans):
        treated = _treat(treatment, block, chosen)
        for plan in block.plans:
            treatment.store(plan, block.layers[plan.name], treated[plan.name])
    for plan in block.plans:
        treatment.put_stored(plan, block.layers[plan.name], block.rounding)
    give_back_memory()


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
        reporter.notice(f"{method} cannot use what enters these layers; rounded to nearest: {first_names(blind)}.")
    if lost := [name for name, record in fallen.items() if record["output_error"] is not None]:
        reporter.notice(f"{method} was no better than rounding to nearest, which was kept, on {first_names(lost)}.")


def _tell_of_guesses(treatment: Treatment, plans: list[LayerPlan], reporter: Reporter) -> None:
    """Which layers have fixed activation scales that nothing was seen for; from the journal, as above."""
    fixed = {plan.name: treatment.stored(plan) for plan in plans if plan.scheme and plan.scheme.has_fixed_acts}
    guessed = [
        name for name, found in fixed.items() if found.acts and is_guessed(found.acts, found.weight.scheme.act_bits)
    ]
    if guessed:
        reporter.notice(
            "no call of the calibration set reaches these layers; the ranges of their activations are a guess, "
            f"-{UNSEEN:g} to {UNSEEN:g}: {first_names(guessed)}."
        )


def first_names(names: list[str]) -> str:
    """The first few names."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
