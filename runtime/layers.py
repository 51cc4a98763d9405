"""Layers that hold packed integers and run on them. One class per kind of layer; each is a subclass of the torch layer
it replaces, so that code which looks for linears (adapters, for instance) still finds them.

Stored tensors: `qweight` is a uint8 parameter; `scale`, `zero_point` and `group_scale` are buffers, which diffusers
does not take for the model's dtype. `.to(dtype)` changes the compute dtype only; scales are never cast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.scheme import Scheme
from .kernels_int8 import conv2d_int8_dynamic, linear_int8_dynamic
from .kernels_weight_only import float_weight, int8_rows, linear_weight_only
from .weight import QuantizedWeight, dequantize_rows, state_shapes

Prefer = Literal["memory", "speed"]
SCALE_NAMES = ("scale", "zero_point", "group_scale")


class QuantizedLayer(nn.Module):
    """What all kinds share: the stored tensors, their protection from casts, and the unpacked copy for speed."""

    qweight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    group_scale: Tensor | None

    def __init__(self, original: nn.Module, scheme: Scheme) -> None:
        """Take over the hyperparameters and the bias of `original`; the stored tensors start on the meta device."""
        nn.Module.__init__(self)
        own = set(self.__dict__)
        self.__dict__.update({key: value for key, value in original.__dict__.items() if key not in own})
        weight: Tensor = original.weight  # type: ignore[assignment]
        self.scheme = scheme
        self.weight_shape = tuple(weight.shape)
        self.compute_dtype = weight.dtype
        self.prefer: Prefer = "memory"
        self._unpacked: Tensor | None = None
        for name in SCALE_NAMES:
            self.register_buffer(name, None)
        for name, (shape, dtype) in state_shapes(scheme, self.weight_shape).items():
            self.store(name, torch.empty(shape, dtype=dtype or torch.float32, device="meta"))
        if not isinstance(original, nn.Embedding):
            self.register_parameter("bias", original.bias)  # type: ignore[arg-type]

    def store(self, name: str, tensor: Tensor) -> None:
        """Put one stored tensor in place, as it is."""
        self._unpacked = None
        if name == "qweight":
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        else:
            self._buffers[name] = tensor

    def store_weight(self, weight: QuantizedWeight) -> None:
        """Put all tensors of a quantized weight in place."""
        for name, tensor in weight.tensors().items():
            self.store(name, tensor)

    @property
    def features(self) -> int:
        """Values per row of the flattened weight."""
        return math.prod(self.weight_shape[1:])

    @property
    def act_max(self) -> int:
        """Largest integer of a quantized activation."""
        return int(2 ** (self.scheme.act_bits - 1) - 1)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight in the compute dtype, made anew at each access; for code that only looks at it."""
        return self.stored.dequantize(self.compute_dtype)

    def float_weight(self, hidden_states: Tensor) -> Tensor:
        """The weight in the dtype of the input of one product; in eager mode valid until the next product."""
        dtype = hidden_states.dtype
        if self._unpacked is not None and self._unpacked.dtype == dtype:
            return self._unpacked
        weight = float_weight(hidden_states, self.stored)
        if self.prefer == "speed":
            self._unpacked = weight = weight.clone()  # it lies in memory that is used again
        return weight

    def integer_weight(self, hidden_states: Tensor) -> Tensor:
        """(O, K) int8 for one integer product; for 8 bits a view of the stored bytes."""
        if self._unpacked is not None:
            return self._unpacked
        rows = int8_rows(hidden_states, self.stored)
        if self.prefer == "speed" and self.scheme.bits < 8:
            self._unpacked = rows = rows.clone()
        return rows

    @property
    def stored(self) -> QuantizedWeight:
        """The stored tensors as one value."""
        return QuantizedWeight(
            self.scheme, self.weight_shape, self.qweight, self.scale, self.zero_point, self.group_scale
        )

    def memory_bytes(self) -> int:
        """Bytes that this layer holds now, unpacked copy included."""
        tensors = [*self.parameters(recurse=False), *self.buffers(recurse=False)]
        if self._unpacked is not None:
            tensors.append(self._unpacked)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {name: self._buffers[name] for name in SCALE_NAMES if self._buffers[name] is not None}
        super()._apply(fn, recurse)
        self._unpacked = None
        for name, before in kept.items():
            after = self._buffers[name]
            if after is not None and before is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)  # moved, never cast
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.qweight.device)).dtype
        return self

    def extra_repr(self) -> str:
        return f"{tuple(self.weight_shape)}, scheme={self.scheme.name}"


class QuantizedLinear(QuantizedLayer, nn.Linear):  # type: ignore[override]
    """`y = x W^T + b` with W held as integers."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.scheme.act_bits < 16:
            weight = self.integer_weight(hidden_states)
            return linear_int8_dynamic(hidden_states, weight, self.scale.view(-1), self.bias, qmax=self.act_max)
        if self.prefer == "speed":
            return functional.linear(hidden_states, self.float_weight(hidden_states), self.bias)
        return linear_weight_only(hidden_states, self.stored, self.bias)


class _QuantizedConv(QuantizedLayer):
    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.float_weight(hidden_states)
        return self._conv_forward(hidden_states, weight, self.bias)  # type: ignore[operator]


class QuantizedConv1d(_QuantizedConv, nn.Conv1d):  # type: ignore[override]
    """Weight-only 1-D convolution."""


class QuantizedConv2d(_QuantizedConv, nn.Conv2d):  # type: ignore[override]
    """2-D convolution with integer weights and, by scheme, integer activations."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.scheme.act_bits == 16:
            return super().forward(hidden_states)
        padding = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            hidden_states = functional.pad(hidden_states, self._reversed_padding_repeated_twice, mode=mode)
            padding = (0, 0)
        return conv2d_int8_dynamic(
            hidden_states,
            self.integer_weight(hidden_states),
            self.scale.view(-1),
            self.bias,
            kernel_size=self.kernel_size,  # type: ignore[arg-type]
            stride=self.stride,  # type: ignore[arg-type]
            padding=padding,  # type: ignore[arg-type]
            dilation=self.dilation,  # type: ignore[arg-type]
            groups=self.groups,
            qmax=self.act_max,
        )


class QuantizedConv3d(_QuantizedConv, nn.Conv3d):  # type: ignore[override]
    """Weight-only 3-D convolution."""


class QuantizedEmbedding(QuantizedLayer, nn.Embedding):  # type: ignore[override]
    """A lookup table with one scale per entry; only the rows that are asked for are unpacked."""

    def forward(self, indices: Tensor) -> Tensor:
        flat = indices.reshape(-1)
        zero_point = None if self.zero_point is None else self.zero_point[flat]
        rows = dequantize_rows(self.qweight[flat], self.scale[flat], zero_point, None, self.scheme, self.features)
        return rows.to(self.compute_dtype).view(*indices.shape, self.features)


LAYER_CLASSES: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.Embedding: QuantizedEmbedding,
}


def swap_layers_(model: nn.Module, schemes: dict[str, Scheme]) -> None:
    """Replace the named layers of `model` by empty quantized ones (stored tensors on the meta device)."""
    for name, scheme in schemes.items():
        original = model.get_submodule(name)
        model.set_submodule(name, LAYER_CLASSES[type(original)](original, scheme))


def count_parameters(model: nn.Module) -> int:
    """Parameters of the float model: packed weights count as the numbers that they stand for."""
    total = 0
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            packed = isinstance(module, QuantizedLayer) and name == "qweight"
            total += math.prod(module.weight_shape) if packed else parameter.numel()  # type: ignore[arg-type]
    return total


def set_prefer_(model: nn.Module, prefer: Prefer) -> None:
    """Choose for all quantized layers: unpack at each call (memory) or once (speed)."""
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            module.prefer = prefer
            module._unpacked = None
