"""The layers of a denoiser that see the time step alone, as one unit (temporal information block of TFMQ-DM: Huang et
al., 2024, arXiv 2311.16503, section 4.1).

    h = embedder(t),   g_i = linear_i(SiLU(h))   for every block i

In UNets h is the time embedding (with class and size embeddings where there are some) and g_i the projection of
residual block i; in transformers g_i is the adaLN modulation. What enters them is a finite set, as long as no text is
pooled in.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map

from ..core.families import Family
from ..core.seeds import named_seed
from ..runtime.clock import RunState
from ..runtime.trajectory import DenoiserCall
from .block import Block, Sighting
from .plan import LayerPlan
from .simulate import RoundedInputs
from .walk import UnitInput

ROWS_AT_ONCE = 32  # of h, in one update of the rounding
TOLERANCE = 1e-4  # by which what enters a projection may differ from SiLU(h)

Entering = dict[str, tuple[tuple[Any, ...], dict[str, Any]]]  # embedder -> what enters it in one call


class _Seen(Exception):
    """All that was looked for; the rest of the network need not run."""


class TemporalNetwork(nn.Module):
    """The temporal layers of a denoiser under the names that they have there.

    Args:
        model: the denoiser; its modules are shared, not copied.
        embedders: names of the modules that give h; several for one projection are summed.
        projections: names of the linears that read SiLU(h).
    """

    def __init__(self, model: nn.Module, embedders: list[str], projections: list[str]) -> None:
        super().__init__()
        self.sources = {name: _embedders_of(name, embedders) for name in projections}
        self.embedders = embedders
        for name in (*embedders, *projections):
            _graft_(self, name, model.get_submodule(name))

    def embed(self, entering: Entering) -> dict[str, Tensor]:
        """SiLU(h) for every projection."""
        parts = {name: self.get_submodule(name)(*args, **kwargs) for name, (args, kwargs) in entering.items()}
        return {
            name: functional.silu(torch.stack([parts[source] for source in sources if source in parts]).sum(0))
            for name, sources in self.sources.items()
        }

    def forward(self, entering: Entering) -> tuple[Tensor, ...]:
        """All g_i."""
        return tuple(self.get_submodule(name)(hidden) for name, hidden in self.embed(entering).items())


def find_temporal(model: nn.Module, family: Family, calls: Sequence[DenoiserCall]) -> TemporalNetwork | None:
    """The temporal layers, or None where they are not built as this module says (checked on the first call)."""
    names = [name for name, _ in model.named_modules()]
    embedders = [name for name in names if any(fnmatchcase(name, glob) for glob in family.embedders)]
    projections = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and family.role(name) in ("temporal", "modulation")
        and not any(name.startswith(f"{embedder}.") for embedder in embedders)
    ]
    if not embedders or not projections:
        return None
    network = TemporalNetwork(model, embedders, projections)
    entering, inputs = _watch_call(model, calls[0], embedders, projections)
    if any(name not in inputs for name in projections):
        return None
    try:
        with torch.no_grad():
            expected = network.embed(entering)
    except (RuntimeError, TypeError):  # embeddings that are joined instead of added, or come in pairs
        return None
    return network if all(_is_close(inputs[name], hidden) for name, hidden in expected.items()) else None


def _is_close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, atol=TOLERANCE)


def temporal_block(
    network: TemporalNetwork,
    model: nn.Module,
    plans: Sequence[LayerPlan],
    calls: Sequence[DenoiserCall],
    rounding: RoundedInputs,
    seed: int,
) -> Block:
    """The temporal layers as a unit that can be reconstructed.

    Args:
        plans: of the denoiser's layers; those of other layers are left out.
    """
    entered = [(call.state, _watch_call(model, call, network.embedders, [])[0]) for call in calls]
    by_call = _by_call(network, entered)
    merged = _joined([sighting.entering.args[0] for sighting in by_call])
    inside = {name for name, _ in network.named_modules()}
    return Block(
        name="",
        module=network,
        plans=tuple(plan for plan in plans if plan.name in inside),
        sightings=by_call,
        rounding=rounding,
        seed=named_seed(seed, "temporal"),
        reference=copy.deepcopy(network),
        merged=[_sighting(network, part, None) for part in _chunks(merged)],
    )


def _embedders_of(projection: str, embedders: list[str]) -> list[str]:
    """Those beside the projection, else those nearest above it."""
    homes = {name: name.rpartition(".")[0] for name in embedders}
    reach = [home for home in homes.values() if home == "" or projection.startswith(f"{home}.")]
    nearest = max(reach, key=len, default=None)
    return [name for name, home in homes.items() if home == nearest]


def _graft_(root: nn.Module, name: str, module: nn.Module) -> None:
    """Hang a module under a dotted name, with empty modules on the way."""
    *way, leaf = name.split(".")
    for part in way:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    root.add_module(leaf, module)


def _watch_call(
    model: nn.Module, call: DenoiserCall, embedders: Sequence[str], projections: Sequence[str]
) -> tuple[Entering, dict[str, Tensor]]:
    """Evaluate one call as far as needed; what entered the embedders and the projections."""
    entering: Entering = {}
    inputs: dict[str, Tensor] = {}

    def keep_for(name: str) -> Any:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name in embedders:
                entering.setdefault(name, (args, kwargs))
            else:
                inputs.setdefault(name, args[0])
            if len(entering) == len(embedders) and len(inputs) == len(projections):
                raise _Seen

        return keep

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(keep_for(name), with_kwargs=True)
        for name in (*embedders, *projections)
    ]
    try:
        with suppress(_Seen):
            call.replay(model)
    finally:
        for hook in hooks:
            hook.remove()
    return entering, inputs


def _by_call(network: TemporalNetwork, entered: list[tuple[RunState | None, Entering]]) -> list[Sighting]:
    """Different rows only, one sighting for each call of the grid."""
    places: dict[int, list[tuple[RunState | None, Entering]]] = {}
    for state, entering in entered:
        places.setdefault(state.call if state else 0, []).append((state, entering))
    return [
        _sighting(network, _distinct(_joined([entering for _, entering in found])), found[0][0])
        for _, found in sorted(places.items())
    ]


@torch.no_grad()
def _sighting(network: TemporalNetwork, entering: Entering, state: RunState | None) -> Sighting:
    return Sighting(state, UnitInput((entering,), {}), network(entering), UnitInput((entering,), {}))


def _joined(parts: list[Entering]) -> Entering:
    """The rows of several inputs below each other."""
    first = parts[0]
    return _sized(
        {
            name: tree_map(lambda *values: _cat(values), *[part[name] for part in parts])  # type: ignore[misc]
            for name in first
        }
    )


def _sized(entering: Entering) -> Entering:
    """With the number of rows that there are now, where an embedder is told it."""
    rows = _row_count(entering)
    return {
        name: (args, kwargs | {"batch_size": rows} if "batch_size" in kwargs else kwargs)
        for name, (args, kwargs) in entering.items()
    }


def _cat(values: tuple[Any, ...]) -> Any:
    if isinstance(values[0], Tensor):
        return torch.cat([value if value.ndim else value[None] for value in values])
    return values[0]


def _chunks(entering: Entering) -> list[Entering]:
    entering = _distinct(entering)
    rows = _row_count(entering)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    return [_take(entering, some) for some in order.split(ROWS_AT_ONCE)]


def _distinct(entering: Entering) -> Entering:
    """Without rows that are there twice: thousands of samples share a time step."""
    tensors = [leaf.double().flatten(1) if leaf.ndim > 1 else leaf.double()[:, None] for leaf in _tensors(entering)]
    _, place = torch.cat(tensors, dim=1).unique(dim=0, return_inverse=True)
    numbers = torch.arange(len(place), device=place.device)
    firsts = numbers.new_full((int(place.max()) + 1,), len(place)).scatter_reduce(0, place, numbers, reduce="amin")
    return _take(entering, firsts.sort().values)


def _take(entering: Entering, rows: Tensor) -> Entering:
    taken: Entering = tree_map(lambda leaf: leaf[rows] if isinstance(leaf, Tensor) else leaf, entering)
    return _sized(taken)


def _row_count(entering: Entering) -> int:
    return len(_tensors(entering)[0])


def _tensors(entering: Entering) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(entering) if isinstance(leaf, Tensor)]
