"""How much a call holds, in front of a unit or in training, and how many may therefore be held at once."""

from __future__ import annotations

import gc
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..calibrate.store import CalibrationSet
from ..core.errors import ResourceError
from ..core.reporter import Reporter
from ..core.seeds import named_seed
from ..runtime.clock import fixed_run
from ..runtime.trajectory import DenoiserCall
from .block import outputs_of
from .walk import UnitInput, Walk

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
) -> tuple[Sequence[DenoiserCall], int]:
    """The calls that may walk through the network at once, see `drawn_within`; and the bytes that they hold together.

    Args:
        walks: networks that every call walks through.

    Raises:
        ResourceError: not even one call fits.
    """
    each = held_bytes(model, _largest(calls), units, walks=walks)
    found = drawn_within(budget_gb, each, calls, "on the way through the network", seed=seed, reporter=reporter)
    return found, each * len(found)


def calls_to_train_on(
    budget_gb: float, reference: nn.Module, calls: Sequence[DenoiserCall], *, seed: int, reporter: Reporter
) -> list[DenoiserCall]:
    """The calls whose inputs and float outputs are held together, see `drawn_within`.

    Raises:
        ResourceError: not even one call fits.
    """
    call = _largest(calls)
    each = _bytes_of((call.args, call.kwargs, outputs_of(call.replay(reference))))
    return drawn_within(budget_gb, each, calls, "while the network is trained", seed=seed, reporter=reporter)


def drawn_within(
    budget_gb: float, each: int, calls: Sequence[DenoiserCall], when: str, *, seed: int, reporter: Reporter
) -> list[DenoiserCall]:
    """All calls, or as many as stay within the budget, drawn at random so that all moments of the run have their share;
    a notice says so. Others are not loaded.

    Args:
        each: bytes that a call holds.
        when: it holds them, for messages.

    Raises:
        ResourceError: not even one call fits.
    """
    fitting = int(budget_gb * GIGABYTE / max(1, each))
    if fitting >= len(calls):
        return list(calls)
    if fitting < 1:
        raise ResourceError(
            f"one call of the calibration set holds {each / GIGABYTE:.1f} GB {when}.",
            f"The budget is {budget_gb:g} GB.",
            "Raise --cache-gb, or make a set with a smaller --batch-size.",
        )
    reporter.notice(f"{fitting} of the {len(calls)} calls of the calibration set fit into {budget_gb:g} GB {when}.")
    moments = calls.moments if isinstance(calls, CalibrationSet) else [c.state.call if c.state else 0 for c in calls]
    generator = torch.Generator().manual_seed(named_seed(seed, "calls"))
    return [calls[place] for place in spread_over(moments, fitting, generator)]


def _largest(calls: Sequence[DenoiserCall]) -> DenoiserCall:
    """One with the most samples; of a set on the disk the only one that is loaded."""
    return calls.largest if isinstance(calls, CalibrationSet) else calls[0]


def spread_over(moments: Sequence[int], count: int, generator: torch.Generator) -> list[int]:
    """Places of so many, ascending: one drawn of each moment, then one more, evenly spread where not all have one."""
    rounds: defaultdict[int, list[int]] = defaultdict(list)
    seen = Counter[int]()
    for place in torch.randperm(len(moments), generator=generator).tolist():
        rounds[seen[moments[place]]].append(place)
        seen[moments[place]] += 1
    chosen: list[int] = []
    for _, places in sorted(rounds.items()):
        ordered = sorted(places, key=lambda place: moments[place])
        taken = min(count - len(chosen), len(ordered))
        chosen += [ordered[(2 * number + 1) * len(ordered) // (2 * taken)] for number in range(taken)]
    return sorted(chosen)


def held_bytes(model: nn.Module, call: DenoiserCall, units: Sequence[str], *, walks: int = 1) -> int:
    """Most bytes of tensors that one call keeps alive while it waits for a unit, its inputs included.

    Args:
        walks: networks that it walks through; with two, what a unit gives in the second is kept until it is treated.
    """
    most, own = 0, {weight.untyped_storage().data_ptr() for weight in (*model.parameters(), *model.buffers())}
    gc.freeze()  # what is alive now does not count, and need not be looked through at every unit
    try:
        with Walk(model, [call], units) as walk:
            for unit in units:
                (entering,) = walk.advance(unit)
                alive = sum(size for place, size in _storages().items() if place not in own)
                given = _given_bytes(model.get_submodule(unit), call, entering) if walks > 1 and entering else 0
                most = max(most, walks * alive + given)
    finally:
        gc.unfreeze()
    return most + _bytes_of((call.args, call.kwargs))


@torch.no_grad()
def _given_bytes(unit: nn.Module, call: DenoiserCall, entering: UnitInput) -> int:
    """What a unit gives in a call."""
    with fixed_run(call.state):
        return _bytes_of(unit(*entering.args, **entering.kwargs))


def _storages() -> dict[int, int]:
    """Address -> bytes of the memory behind every tensor that was made since the freeze and is alive."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) is Tensor and thing.layout == torch.strided and not thing.is_meta:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def _bytes_of(tree: Any) -> int:
    """Of the memory behind the tensors of a tree."""
    storages = [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
