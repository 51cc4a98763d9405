"""Multiply-accumulates of what really runs, counted by PyTorch's own counter (which counts two operations for each).

The counter does not know attention on a CPU, nor integer products; those are added here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

Shape = tuple[int, ...]


def count_macs(action: Callable[[], Any]) -> int:
    """Multiply-accumulates of linear layers, convolutions and attention while `action` runs."""
    with FlopCounterMode(display=False, custom_mapping=_EXTRA) as counter:
        action()
    operations: int = counter.get_total_flops()
    return operations // 2


@dataclass
class DenoiserMacs:
    """What the calls of a denoiser cost, added up."""

    macs: int = 0


@contextmanager
def counting_calls(denoiser: nn.Module) -> Iterator[DenoiserMacs]:
    """Count the multiply-accumulates of every call of a denoiser, whatever else a pipeline computes."""
    total, counters = DenoiserMacs(), list[FlopCounterMode]()

    def begin(*_: Any) -> None:
        counters.append(FlopCounterMode(display=False, custom_mapping=_EXTRA))
        counters[-1].__enter__()

    def end(*_: Any) -> None:
        counter = counters.pop()
        counter.__exit__(None, None, None)
        total.macs += counter.get_total_flops() // 2

    handles = denoiser.register_forward_pre_hook(begin), denoiser.register_forward_hook(end, always_call=True)
    try:
        yield total
    finally:
        for handle in handles:
            handle.remove()


def _matrix_product(first: Shape, second: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * prod(first) * second[-1]


def _packed_product(inputs: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Inputs (..., K) times packed weights whose shape says nothing."""
    return 2 * int(prod(out_shape)) * inputs[-1]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    *batch, queries, width = query
    return 2 * prod(batch) * queries * key[-2] * (width + value[-1])


_EXTRA: dict[Any, Any] = {
    torch.ops.aten._int_mm: _matrix_product,
    torch.ops.aten._weight_int4pack_mm: _packed_product,
    torch.ops.aten._weight_int4pack_mm_for_cpu: _packed_product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
}
