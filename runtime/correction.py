"""Correction of reused and of forecast values. What a denoiser call reuses becomes, after CacheQuant: Accelerating
Diffusion Models Jointly with Quantization and Caching (2025), arXiv 2503.01323,

    scale[call, channel] * value + shift[call, channel]

and, where there are such tables, beside that of few ranks r, from all channels to all,

    + sum over r of up[call, r, channel] * sum over channels c of down[call, r, c] * value_c

What it forecasts is in the same way fitted to the last H computed values, in place of a polynomial through them:

    sum over j of weights[call, j, channel] * value_j + shift[call, channel]

Channels are the second axis of a feature map, the last one of a token sequence. The tables of a unit that keeps several
tensors are one pair for each of them. Early calls, that have fewer values, use the last rows of their weights.
Letters: C calls of the plan's grid, H values that a forecast looks at, N channels, R ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..core.cache_plan import CachePlan
from ..core.errors import BundleError
from ..core.safe_read import read_header
from ..core.tensor_file import StoredTensor, content_hash

MAP_DIMENSIONS = 4  # tensors of so many and more are feature maps
SCALE, SHIFT, WEIGHTS, DOWN, UP = "scale", "shift", "weights", "down", "up"
DIMENSIONS = {SCALE: 2, SHIFT: 2, WEIGHTS: 3, DOWN: 3, UP: 3}


class Correction:
    """The tables of one plan.

    Args:
        tables: `table_name` and `scale` or `shift`, with a dot between -> (C, N), `weights` -> (C, H, N),
            `down` and `up` -> (C, R, N); float32.
        plan: whose reused values they are for.

    Raises:
        BundleError: they are not the tables of this plan.
    """

    def __init__(self, tables: Mapping[str, Tensor], plan: CachePlan) -> None:
        self.tables = dict(tables)
        self._check(plan)
        self._backs = {name: _backs(table) for name, table in tables.items() if name.endswith(f".{WEIGHTS}")}

    def looks_back(self, unit: str, path: str, call: int) -> int:
        """To how many of the last computed values a forecast at a call gives weight, 1 to H."""
        stem = f"{unit}/{path}/"
        return max((backs[call] for name, backs in self._backs.items() if name.startswith(stem)), default=1)

    def apply(self, unit: str, path: str, call: int, value: Any) -> Any:
        """The kept output of a module, corrected for a call.

        Raises:
            BundleError: the tables are for other channels.
        """
        leaves, form = tree_flatten(value)
        found = [
            self._corrected(table_name(unit, path, number), call, leaf) if torch.is_tensor(leaf) else leaf
            for number, leaf in enumerate(leaves)
        ]
        return tree_unflatten(found, form)

    def forecast(self, unit: str, path: str, call: int, values: Sequence[Any]) -> Any:
        """The output of a module at a call, from what it gave at the computed ones before, the newest last.

        Raises:
            BundleError: the tables are for other channels.
        """
        rows = [tree_flatten(value)[0] for value in values]
        leaves, form = tree_flatten(values[-1])
        found = [
            self._combined(table_name(unit, path, number), call, [row[number] for row in rows])
            if torch.is_tensor(leaf) and leaf.is_floating_point()
            else leaf
            for number, leaf in enumerate(leaves)
        ]
        return tree_unflatten(found, form)

    def _combined(self, name: str, call: int, values: Sequence[Tensor]) -> Tensor:
        newest = values[-1]
        weights = self._table(f"{name}.{WEIGHTS}", newest)[call, -len(values) :]
        shift = self._table(f"{name}.{SHIFT}", newest)[call]
        shape = [1] * newest.ndim
        shape[channel_axis(newest)] = -1
        total = shift.reshape(shape)
        for weight, value in zip(weights, values, strict=True):
            total = torch.addcmul(total, value.float(), weight.reshape(shape))
        return total.to(newest.dtype)

    def _table(self, name: str, value: Tensor) -> Tensor:
        """The table of one tensor, on its device."""
        table = self.tables.get(name)
        channels = value.shape[channel_axis(value)]
        if table is None or table.shape[-1] != channels:
            known = "none" if table is None else f"one for {table.shape[-1]} channels"
            raise BundleError(f"{name} is for {channels} channels; there is {known}.", mend=_ANEW)
        return table if table.device == value.device else self._moved(name, value.device)

    def _corrected(self, name: str, call: int, value: Tensor) -> Tensor:
        scale, shift = (self._table(f"{name}.{part}", value)[call] for part in (SCALE, SHIFT))
        if f"{name}.{UP}" not in self.tables:
            return affine(value, scale, shift)
        down, up = (self._table(f"{name}.{part}", value)[call] for part in (DOWN, UP))
        axis, wide = channel_axis(value), value.float()  # the summand takes back what the mean adds
        mixed = wide.movedim(axis, -1) @ down.T @ up
        return (affine(wide, scale, shift) + mixed.movedim(-1, axis)).to(value.dtype)

    def _moved(self, name: str, device: torch.device) -> Tensor:
        self.tables[name] = self.tables[name].to(device)
        return self.tables[name]

    def _check(self, plan: CachePlan) -> None:
        if plan.correction is None or content_hash(self.tables) != plan.correction.sha256:
            raise BundleError("the correction of a cache plan is not what the plan says.", mend=_ANEW)
        for name, table in self.tables.items():
            stem, _, part = name.rpartition(".")
            fits = table.ndim == DIMENSIONS.get(part) and len(table) == plan.calls and table.dtype == torch.float32
            others = [self.tables.get(f"{stem}.{other}") for other in self._beside(stem, part)]
            if not fits or any(other is None or not _go_together(table, other) for other in others):
                raise BundleError(
                    f"the correction table {name!r} {tuple(table.shape)} does not fit a plan of {plan.calls} calls.",
                    mend=_ANEW,
                )

    def _beside(self, stem: str, part: str) -> tuple[str, ...]:
        """What must be there beside a table."""
        if part in (DOWN, UP):
            return SCALE, DOWN if part == UP else UP
        factor = SCALE if f"{stem}.{SCALE}" in self.tables else WEIGHTS
        return (SHIFT if part == factor else factor,)


def read_correction(component_folder: Path, plan: CachePlan) -> Correction | None:
    """The correction that lies in the folder of a component; None where the plan has none.

    Raises:
        BundleError: the file is missing, damaged, or not the plan's.
    """
    if plan.correction is None:
        return None
    file = component_folder / plan.correction.file
    return Correction({name: StoredTensor(file, info).load() for name, info in read_header(file).items()}, plan)


def _go_together(table: Tensor, other: Tensor) -> bool:
    """Equally many channels, and ranks."""
    return table.shape == other.shape if table.ndim == other.ndim else table.shape[-1] == other.shape[-1]


def affine(value: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale x + shift per channel; both (N,)."""
    shape = [1] * value.ndim
    shape[channel_axis(value)] = -1
    return torch.addcmul(shift.to(value.dtype).reshape(shape), value, scale.to(value.dtype).reshape(shape))


def _backs(table: Tensor) -> list[int]:
    """(C, H, N) weights -> of every call how far the first one that counts stands from the end, at least 1."""
    counts = (table != 0).any(-1).int()
    return [
        counts.shape[1] - first if some else 1
        for first, some in zip(counts.argmax(1).tolist(), counts.any(1).tolist(), strict=True)
    ]


def table_name(unit: str, path: str, number: int) -> str:
    """How the tables of one tensor are called: the unit, the module, and the place in what the module gives."""
    return f"{unit}/{path}/{number}"


def channel_axis(value: Tensor) -> int:
    """The axis whose entries have maps of their own."""
    return 1 if value.ndim >= MAP_DIMENSIONS else value.ndim - 1


_ANEW = "Copy the bundle again, or make the plan anew with dacc search-cache."
