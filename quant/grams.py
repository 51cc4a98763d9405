"""Second moments of what enters a layer, E[x x^T], gathered by hooks while its block runs.

Letters: N tokens (or pixels of the result), K input features per row in the order of `to_rows`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .entry import Watch


class Grams(Watch):
    """Gathers the gram matrices of some layers; a context manager.

    Args:
        layers: linears and ungrouped 2-D convolutions, by name.
        rows_per_call: at most so many rows of x count in one run of a layer, drawn anew each time; more: slower,
            steadier.
    """

    def __init__(self, layers: dict[str, nn.Module], *, rows_per_call: int) -> None:
        self._rows_per_call = rows_per_call
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        super().__init__((layer, self._gather(name)) for name, layer in layers.items())

    def mean(self, name: str) -> Tensor | None:
        """(K, K) float32, symmetric; None for a layer that did not run."""
        return self._sums[name] / self._counts[name] if name in self._counts else None

    def _gather(self, name: str) -> Any:
        def gather(layer: nn.Module, x: Tensor) -> None:
            count = self._counts.get(name, 0)
            rows = some_rows(layer, x, self._rows_per_call, seed=count).float()
            if name not in self._sums:
                self._sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
            self._sums[name].addmm_(rows.T, rows)
            self._counts[name] = count + len(rows)

        return gather


def some_rows(layer: nn.Module, x: Tensor, count: int, *, seed: int) -> Tensor:
    """At most `count` input rows, drawn: every n-th one would fall in step with the columns of an image.

    The patches of a convolution are many times as large as its input: they are made image by image.
    """
    images = x.split(1) if isinstance(layer, nn.Conv2d) else [x]
    first = input_rows(layer, images[0])
    size, total = len(first), len(first) * len(images)
    if len(images) == 1 and total <= count:
        return first
    chosen = torch.arange(total)
    if total > count:
        chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]
    found = first.new_empty(len(chosen), first.shape[1])
    for number, image in enumerate(images):
        mine = chosen // size == number
        rows = first if number == 0 else input_rows(layer, image)
        found[mine.to(found.device)] = rows[(chosen[mine] % size).to(rows.device)]
    return found


def has_grams(layer: nn.Module) -> bool:
    """Whether the inputs of a layer are rows of one matrix product."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer multiplies its weight rows with, (N, K): tokens of a linear, patches of a convolution."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2)
    assert isinstance(layer, nn.Conv2d)
    padding = layer.padding
    if layer.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, padding = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode), (0, 0)
    patches = functional.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)  # (B, C * taps, L)
    channels = x.shape[1]
    return patches.unflatten(1, (channels, -1)).permute(0, 3, 2, 1).flatten(2).flatten(0, 1)  # channels innermost
