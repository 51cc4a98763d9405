"""Linear on int8 weights and int8 activations with one activation scale for each token and group of input features:

    q_x = round(x / s_x),  s_x = max|x| / qmax over a group
    y   = sum over groups of (q_x . q_w over the group) * s_x * s_w + bias

The sums over a group are exact in int32; float32 adds them up, group after group. That many short products take longer
than one wide product, which one scale per token allows.
Letters: M rows (tokens), K inner size, N features of a group, G = K / N groups, O out_features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels_int8 import blocks, int8_product, quantize_tokens
from .kernels_scratch import may_use_scratch

_OUTPUT_BLOCK = 2**18  # outputs summed at once (1 MB): larger saves calls, smaller stays in cache through the groups


def linear_int8_grouped(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    group_size: int,
    qmax: int = 127,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """(..., K) float, (O, K) int8, (O, G) float -> (..., O) of `dtype` (of `x` by default).

    Args:
        group_size: features that share an activation scale; divides K.
    """
    outputs, groups = weight_scale.shape
    integers, scale = quantize_tokens(x, qmax, group_size)
    grouped = integers.view(-1, groups, group_size).transpose(0, 1).contiguous()  # (G, M, N)
    scale = scale.view(-1, groups).t().unsqueeze(-1).contiguous()  # (G, M, 1)
    weight_scale = weight_scale.float().t().contiguous()  # (G, O)
    columns = weight.view(outputs, groups, group_size).unbind(1)
    if may_use_scratch(x):
        y = torch.empty(grouped.shape[1], outputs, dtype=dtype or x.dtype)
        for rows in blocks(len(y), _OUTPUT_BLOCK // max(outputs, 1)):
            y[rows] = _sum_of_groups(grouped[:, rows], scale[:, rows], columns, weight_scale, bias)
    else:
        y = _sum_of_groups(grouped, scale, columns, weight_scale, bias).to(dtype or x.dtype)
    return y.view(*x.shape[:-1], outputs)


def _sum_of_groups(
    integers: Tensor, scale: Tensor, columns: tuple[Tensor, ...], weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """(G, M, N) int8, (G, M, 1) float32, G times (O, N) int8, (G, O) float32 -> (M, O) float32."""
    total = int8_product(integers[0], scale[0], columns[0], weight_scale[0], bias, torch.float32)
    for group in range(1, len(columns)):
        total += int8_product(integers[group], scale[group], columns[group], weight_scale[group], None, torch.float32)
    return total
