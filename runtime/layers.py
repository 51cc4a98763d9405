"""Layers that hold packed integers and run on them. One class per kind of layer; each is a subclass of the torch layer
it replaces, so that code which looks for linears (adapters, for instance) still finds them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.scheme import Scheme
from .kernels_grouped import linear_int8_grouped
from .kernels_int8 import conv2d_int8_dynamic, linear_int8_dynamic
from .kernels_static import StaticInput, conv2d_int8_static, linear_int8_static
from .kernels_weight_only import linear_weight_only
from .low_rank import add_low_rank, shifted, smoothed
from .quantized_layer import Prefer, QuantizedLayer
from .step_table import StepTable, hook_step_table_
from .weight import dequantize_rows, spread


class _IntegerLayer(QuantizedLayer):
    """Kinds that multiply integers where the scheme rounds activations."""

    def run_integers(self, hidden_states: Tensor, channels: int) -> Tensor:
        """The output; in a split layer the sum of those of the parts of axis `channels` of the input."""
        weight, split, bias = self.integer_weight(hidden_states), self.scheme.split, self.integer_bias()
        if split is None:
            return self.run_part(0, hidden_states, weight, bias, hidden_states.dtype)
        first, second = hidden_states.tensor_split([split], channels)
        y = self.run_part(0, first, weight[:, :split], bias, torch.float32)
        return (y + self.run_part(1, second, weight[:, split:], None, torch.float32)).to(hidden_states.dtype)

    def integer_bias(self) -> Tensor | None:
        """(O,) what is added to the products: the bias, less what shifted inputs have too much."""
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        if (surplus := self.shift_outputs()) is None:
            return bias
        return -surplus if bias is None else bias.float() - surplus

    def run_part(self, part: int, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The output of one part of the input channels with its columns of the integer weight (O, K of the part)."""
        raise NotImplementedError

    def rounding(self, part: int) -> dict[str, Any]:
        """How this part of the input is rounded against a scale that is found in it."""
        return {"qmax": self.scheme.act_max, "row_sums": self.row_sums()[part] if self.scheme.act_offset else None}

    def static_input(self, part: int) -> StaticInput:
        """How fixed scales round this part of the input."""
        scale, zero_point = self.activation_scale()
        return StaticInput(scale[part], zero_point[part], self.row_sums()[part], self.scheme.act_bits)


class QuantizedLinear(_IntegerLayer, nn.Linear):  # type: ignore[override]
    """`y = x W^T + b` with W held as integers, and what they leave out beside them."""

    # the argument has torch's name: some models give it by name
    def forward(self, input: Tensor) -> Tensor:
        if self.scheme.act_bits == 16 and self.prefer == "speed":
            return functional.linear(input, self.float_weight(input), self.bias)
        entering = smoothed(input, self.smoothing)
        rounded = entering
        if self.act_shift is not None:
            rounded = smoothed(shifted(input, self.act_shift), self.smoothing)
        if self.scheme.act_group_size is not None:
            y = self._run_groups(rounded, self.scheme.act_group_size)
        elif self.scheme.act_bits < 16:
            y = self.run_integers(rounded, -1)
        else:
            y = linear_weight_only(entering, self.stored, self.bias)
        return add_low_rank(y, entering, self.low_rank_down, self.low_rank_up)

    def _run_groups(self, x: Tensor, group_size: int) -> Tensor:
        """Groups end where the parts of a split end, so that each belongs to one of them."""
        groups, split = self.features // group_size, self.scheme.split
        scale = spread(self.scale, groups, split and split // group_size)  # (O, G)
        weight = self.integer_weight(x)
        return linear_int8_grouped(
            x,
            weight,
            scale,
            self.integer_bias(),
            group_size=group_size,
            qmax=self.scheme.act_max,
            row_sums=self.row_sums() if self.scheme.act_offset else None,
        )

    def run_part(self, part: int, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        scale = self.scale[:, part]
        if self.scheme.act_mode == "dynamic":
            return linear_int8_dynamic(x, weight, scale, bias, dtype=dtype, **self.rounding(part))
        return linear_int8_static(x, weight, scale, bias, act=self.static_input(part), dtype=dtype)


class _QuantizedConv(QuantizedLayer):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.float_weight(input)
        return self._conv_forward(input, weight, self.bias)  # type: ignore[operator]


class QuantizedConv1d(_QuantizedConv, nn.Conv1d):  # type: ignore[override]
    """Weight-only 1-D convolution."""


class QuantizedConv2d(_QuantizedConv, _IntegerLayer, nn.Conv2d):  # type: ignore[override]
    """2-D convolution with integer weights and, by scheme, integer activations."""

    def forward(self, input: Tensor) -> Tensor:
        if self.scheme.act_bits == 16:
            return super().forward(input)
        input = smoothed(input, self.smoothing, 1)
        if self._pads_before():
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = functional.pad(input, self._reversed_padding_repeated_twice, mode=mode)
        return self.run_integers(input, 1)

    def _pads_before(self) -> bool:
        """Whether the floats are padded; else the integers are, which is faster."""
        return self.padding_mode != "zeros" or isinstance(self.padding, str)

    def run_part(self, part: int, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        scale = self.scale[:, part]
        options: dict[str, Any] = {
            name: getattr(self, name) for name in ("kernel_size", "stride", "dilation", "groups")
        }
        options |= {"padding": (0, 0) if self._pads_before() else self.padding, "dtype": dtype}
        if self.scheme.act_mode == "dynamic":
            return conv2d_int8_dynamic(x, weight, scale, bias, **options, **self.rounding(part))
        return conv2d_int8_static(x, weight, scale, bias, act=self.static_input(part), **options)


class QuantizedConv3d(_QuantizedConv, nn.Conv3d):  # type: ignore[override]
    """Weight-only 3-D convolution."""


class QuantizedEmbedding(QuantizedLayer, nn.Embedding):  # type: ignore[override]
    """A lookup table with one scale per entry; only the rows that are asked for are unpacked."""

    def forward(self, indices: Tensor) -> Tensor:
        flat = indices.reshape(-1)
        # refuses negative entries as `nn.Embedding` does; brackets would count them from the end
        zero_point = None if self.zero_point is None else self.zero_point.index_select(0, flat)
        qweight, scale = self.qweight.index_select(0, flat), self.scale.index_select(0, flat)
        rows = dequantize_rows(qweight, scale, zero_point, None, self.scheme, self.features)
        return rows.to(self.compute_dtype).view(*indices.shape, self.features)


LAYER_CLASSES: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.Embedding: QuantizedEmbedding,
}


def swap_layers_(model: nn.Module, schemes: dict[str, Scheme], *, steps: StepTable | None = None) -> None:
    """Replace the named layers of `model` by empty quantized ones (stored tensors on the meta device).

    Args:
        steps: chooses the row of per-step schemes; see `set_step_table_`.
    """
    for name, scheme in schemes.items():
        original = model.get_submodule(name)
        model.set_submodule(name, LAYER_CLASSES[type(original)](original, scheme))
    if steps is not None:
        set_step_table_(model, steps)


def set_step_table_(model: nn.Module, steps: StepTable) -> None:
    """Let all layers with per-step scales choose their row by one table, and keep it current for compiled ones."""
    for module in model.modules():
        if isinstance(module, QuantizedLayer) and module.scheme.act_mode == "per-step":
            module.step_table = steps
    hook_step_table_(model, steps)


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
