"""How much a call holds while it stands still in front of a unit, and how many calls may therefore walk at once."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..core.errors import ResourceError
from ..core.reporter import Reporter
from ..core.seeds import named_seed
from ..runtime.trajectory import DenoiserCall
from .walk import Walk

GIGABYTE = 1e9


def calls_within(
    budget_gb: float,
    model: nn.Module,
    calls: Sequence[DenoiserCall],
    units: Sequence[str],
    *,
    walks: int,
    seed: int,
    reporter: Reporter,
) -> Sequence[DenoiserCall]:
    """All calls, or as many as stay within the budget, drawn at random; a notice says so.

    Args:
        walks: networks that every call walks through.

    Raises:
        ResourceError: not even one call fits.
    """
    each = walks * held_bytes(model, calls[0], units)
    fitting = int(budget_gb * GIGABYTE / max(1, each))
    if fitting >= len(calls):
        return calls
    if fitting < 1:
        raise ResourceError(
            f"one call of the calibration set holds {each / GIGABYTE:.1f} GB on its way through the network.",
            f"The budget is {budget_gb:g} GB.",
            "Raise --cache-gb, or make a set with a smaller --batch-size.",
        )
    reporter.notice(f"{fitting} of the {len(calls)} calls of the calibration set fit into {budget_gb:g} GB.")
    generator = torch.Generator().manual_seed(named_seed(seed, "calls"))
    chosen = torch.randperm(len(calls), generator=generator)[:fitting].sort().values
    return [calls[index] for index in chosen.tolist()]


def held_bytes(model: nn.Module, call: DenoiserCall, units: Sequence[str]) -> int:
    """Most bytes of tensors that one call keeps alive while it waits for a unit, its inputs included."""
    most, own = 0, {weight.untyped_storage().data_ptr() for weight in (*model.parameters(), *model.buffers())}
    gc.freeze()  # what is alive now does not count, and need not be looked through at every unit
    try:
        with Walk(model, [call], units) as walk:
            for unit in units:
                walk.advance(unit)
                alive = {place: size for place, size in _storages().items() if place not in own}
                most = max(most, sum(alive.values()))
    finally:
        gc.unfreeze()
    inputs = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors_of(call)}
    return most + sum(inputs.values())


def _storages() -> dict[int, int]:
    """Address -> bytes of the memory behind every tensor that was made since the freeze and is alive."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) is Tensor and thing.layout == torch.strided and not thing.is_meta:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def _tensors_of(call: DenoiserCall) -> list[Tensor]:
    return [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
