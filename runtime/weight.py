"""One quantized weight as a value: packed codes with their scales, and the arithmetic that turns them back to floats.

Letters: O output channels (rows), K input features per row, G = K / group_size groups per row, B packed bytes per row.
A convolution weight (O, I / groups, *kernel) becomes rows with the channels innermost, (O, *kernel, I / groups): so lie
the patches of a channels-last image in memory, and an integer product reads the stored bytes as they are. An embedding
table (entries, width) has one row per entry. A split scheme has P = 2 parts of the features of a row, else P = 1.
A weight may have more beside its integers, see low_rank.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.scheme import Scheme
from .low_rank import LOW_RANK_NAMES, low_rank_shapes, whole_weight
from .nvfp4 import nvfp4_rows
from .packing import pack_codes, packed_width, unpack_codes

STATE_NAMES = ("qweight", "scale", "zero_point", "group_scale", *LOW_RANK_NAMES)


@dataclass(frozen=True)
class QuantizedWeight:
    """What a quantization method returns and a quantized layer stores.

    Attributes:
        scheme: number format.
        shape: shape of the float weight.
        qweight: (O, B) uint8 packed codes.
        scale: (O, G) float16 or float32; (O, P) for per-channel and two-level schemes; (1, 1) float32 for NVFP4.
        zero_point: (O, G) uint8, asymmetric schemes only; (O, P) when per channel.
        group_scale: (O, G) uint8: in 1..15 for two-level schemes, bytes of E4M3 numbers for NVFP4, else none.
        smoothing: (I,) float16, factors of the input channels, smooth schemes only.
        low_rank_down: (r, K) float16 or float32, schemes with a rank only; so is
        low_rank_up: (O, r).
        act_shift: (1,) float32, added to inputs before they are rounded, shifted schemes only.
    """

    scheme: Scheme
    shape: tuple[int, ...]
    qweight: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    group_scale: Tensor | None = None
    smoothing: Tensor | None = None
    low_rank_down: Tensor | None = None
    low_rank_up: Tensor | None = None
    act_shift: Tensor | None = None

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,  # (O, K) integers
        scheme: Scheme,
        shape: tuple[int, ...],
        *,
        scale: Tensor,
        zero_point: Tensor | None = None,
        group_scale: Tensor | None = None,
    ) -> QuantizedWeight:
        """Pack codes that were rounded against exactly this (already stored-precision) scale."""
        zero_point = None if zero_point is None else zero_point.to(torch.uint8)
        group_scale = None if group_scale is None else group_scale.to(torch.uint8)
        return cls(scheme, tuple(shape), pack_codes(codes, scheme.bits), scale, zero_point, group_scale)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to store, by their state-dict names."""
        named = {name: getattr(self, name) for name in STATE_NAMES}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight in its original shape; the arithmetic is done in float32."""
        whole = whole_weight(self.residual(), self.smoothing, self.low_rank_down, self.low_rank_up)
        return whole.to(dtype)

    def residual(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the integers stand for, in the shape of the weight: all of it in schemes that absorb no outliers."""
        features = math.prod(self.shape[1:])
        rows = dequantize_rows(self.qweight, self.scale, self.zero_point, self.group_scale, self.scheme, features)
        return from_rows(rows, self.shape).to(dtype)


def to_rows(weight: Tensor) -> Tensor:
    """A float weight (O, I, *kernel) as rows (O, K), channels innermost; matrices as they are."""
    return weight.movedim(1, -1).flatten(1)


def from_rows(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `to_rows`; a view, in channels-last order for convolutions."""
    return rows.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def state_shapes(scheme: Scheme, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Shapes and dtypes of the stored tensors of a weight; dtype None means float16 or float32, as the file says."""
    rows, features = shape[0], math.prod(shape[1:])
    groups = features // scheme.group_size if scheme.group_size else scheme.parts
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {
        "qweight": ((rows, packed_width(features, scheme.bits)), torch.uint8),
        "scale": ((rows, scheme.parts if scheme.two_level else groups), None),
    }
    if scheme.format == "nvfp4":
        shapes["scale"] = ((1, 1), torch.float32)
    if not scheme.symmetric:
        shapes["zero_point"] = ((rows, groups), torch.uint8)
    if scheme.two_level or scheme.format == "nvfp4":
        shapes["group_scale"] = ((rows, groups), torch.uint8)
    return shapes | low_rank_shapes(scheme, shape)


def integer_rows(qweight: Tensor, group_scale: Tensor | None, scheme: Scheme, features: int) -> Tensor:
    """(O, K) int8 weights of a symmetric scheme, group multipliers included (exact)."""
    codes = unpack_codes(qweight, scheme.bits, features, signed=True)
    if group_scale is None:
        return codes
    rows, groups = group_scale.shape
    return (codes.view(rows, groups, -1) * group_scale.view(torch.int8).unsqueeze(-1)).view(rows, features)


def dequantize_rows(
    qweight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_scale: Tensor | None,
    scheme: Scheme,
    features: int,
) -> Tensor:
    """(R, K) float32 weights from packed rows; the judge of every kernel."""
    if scheme.format == "nvfp4":
        assert group_scale is not None
        return nvfp4_rows(qweight, scale, group_scale)
    if scheme.symmetric:
        codes = integer_rows(qweight, group_scale, scheme, features).float()
    else:
        codes = unpack_codes(qweight, scheme.bits, features, signed=False).float()
    if scheme.split and scale.shape[1] == 2:
        if zero_point is not None:
            codes = codes - spread(zero_point.float(), features, scheme.split)
        return codes * spread(scale.float(), features, scheme.split)
    grouped = codes.unflatten(1, (scale.shape[1], features // scale.shape[1]))  # (R, G, K/G)
    if zero_point is not None:
        grouped = grouped - zero_point.float().unsqueeze(-1)
    return (grouped * scale.float().unsqueeze(-1)).flatten(1)


def spread(values: Tensor, features: int, split: int | None) -> Tensor:
    """Values per group (R, G), or per part of a split row (R, 2), for every feature of the row: (R, K)."""
    rows, groups = values.shape
    if split and groups == 2:  # two groups of equal size are the two parts: a split lies between groups
        return torch.cat([values[:, :1].expand(rows, split), values[:, 1:].expand(rows, features - split)], 1)
    return values.unsqueeze(-1).expand(rows, groups, features // groups).reshape(rows, features)


def scale_columns(scale: Tensor, group_scale: Tensor | None, scheme: Scheme, features: int) -> Tensor:
    """What one step of the code of every feature is worth: (O, K) float32."""
    columns = spread(scale.float(), features, scheme.split)
    return columns if group_scale is None else columns * spread(group_scale.float(), features, scheme.split)
