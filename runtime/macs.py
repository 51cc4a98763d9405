"""Multiply-accumulates of what really runs, counted by PyTorch's own counter (which counts two operations for each).

The counter does not know attention on a CPU, nor integer products; those are added here.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Shape = tuple[int, ...]


def count_macs(action: Callable[[], Any]) -> int:
    """Multiply-accumulates of linear layers, convolutions and attention while `action` runs."""
    with FlopCounterMode(display=False, custom_mapping=_EXTRA) as counter:
        action()
    operations: int = counter.get_total_flops()
    return operations // 2


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
