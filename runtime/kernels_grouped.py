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

from .kernels_int8 import Offset, int8_product
from .kernels_round import blocks, quantize_tokens
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
    row_sums: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """(..., K) float, (O, K) int8, (O, G) float -> (..., O) of `dtype` (of `x` by default).

    Args:
        group_size: features that share an activation scale; divides K.
        row_sums: (G, O) int32, sums of the integers of each row within a group; given, tokens have zero points.
    """
    outputs, groups = weight_scale.shape
    integers, scale, zero = quantize_tokens(x, qmax, group_size, offset=row_sums is not None)
    grouped = integers.view(-1, groups, group_size).transpose(0, 1).contiguous()  # (G, M, N)
    scale = _by_group(scale, groups)
    zero = None if zero is None else _by_group(zero, groups)
    weight_scale = weight_scale.float().t().contiguous()  # (G, O)
    columns = weight.view(outputs, groups, group_size).unbind(1)

    def product(group: int, rows: slice, added: Tensor | None = None) -> Tensor:
        """What a group gives to some tokens, (R, O) float32."""
        offset = None if zero is None or row_sums is None else Offset(zero[group, rows], row_sums[group])
        some = grouped[group, rows], scale[group, rows], columns[group], weight_scale[group]
        return int8_product(*some, added, torch.float32, offset)

    def sum_of_groups(rows: slice) -> Tensor:
        total = product(0, rows, bias)
        for group in range(1, groups):
            total += product(group, rows)
        return total

    tokens = grouped.shape[1]
    if may_use_scratch(x):
        y = torch.empty(tokens, outputs, dtype=dtype or x.dtype)
        for rows in blocks(tokens, _OUTPUT_BLOCK // max(outputs, 1)):
            y[rows] = sum_of_groups(rows)
    else:
        y = sum_of_groups(slice(None)).to(dtype or x.dtype)
    return y.view(*x.shape[:-1], outputs)


def _by_group(values: Tensor, groups: int) -> Tensor:
    """(M * G, 1), those of a token together -> (G, M, 1)."""
    return values.view(-1, groups).t().unsqueeze(-1).contiguous()
