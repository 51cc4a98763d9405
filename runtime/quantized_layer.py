"""What all quantized layers share: the stored tensors, their protection from casts, and the unpacked copy for speed.

Stored tensors: `qweight` is a uint8 parameter; scales and zero points are buffers, which diffusers does not take for
the model's dtype. `.to(dtype)` changes the compute dtype only; scales are never cast.
Letters: O output channels, K input features per row, P parts of input channels, S rows of a table of activation scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..core.scheme import NVFP4_GROUP, Scheme
from .activation import ACTIVATION_NAMES, ActivationScale, activation_shapes
from .kernels_weight_only import float_weight, int8_rows
from .low_rank import shift_outputs
from .step_table import StepTable
from .weight import STATE_NAMES, QuantizedWeight, integer_rows, state_shapes

Prefer = Literal["memory", "speed"]
STORED_NAMES = (*STATE_NAMES, *ACTIVATION_NAMES)
SCALE_NAMES = STORED_NAMES[1:]  # all but the codes
FOUND_NAMES = ("_row_sums", "_shift_outputs")  # buffers from when they are first needed: offloading refuses empty ones


class QuantizedLayer(nn.Module):
    """Base of the classes in layers.py."""

    qweight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    group_scale: Tensor | None
    smoothing: Tensor | None
    low_rank_down: Tensor | None
    low_rank_up: Tensor | None
    act_shift: Tensor | None
    act_scale: Tensor | None
    act_zero_point: Tensor | None

    def __init__(self, original: nn.Module, scheme: Scheme) -> None:
        """Take over the hyperparameters and the bias of `original`; the stored tensors start on the meta device."""
        nn.Module.__init__(self)
        own = set(self.__dict__)
        self.__dict__.update({key: value for key, value in original.__dict__.items() if key not in own})
        weight: Tensor = original.weight  # type: ignore[assignment]
        check_scheme(original, scheme)
        self.scheme = scheme
        self.weight_shape = tuple(weight.shape)
        self.compute_dtype = weight.dtype
        self.prefer: Prefer = "memory"
        self.step_table: StepTable | None = None
        self._unpacked: Tensor | None = None
        for name in SCALE_NAMES:
            self.register_buffer(name, None)
        for name, (shape, dtype) in (state_shapes(scheme, self.weight_shape) | activation_shapes(scheme)).items():
            self.store(name, torch.empty(shape, dtype=dtype or torch.float32, device="meta"))
        if not isinstance(original, nn.Embedding):
            self.register_parameter("bias", original.bias)  # type: ignore[arg-type]

    def store(self, name: str, tensor: Tensor) -> None:
        """Put one stored tensor in place, as it is."""
        self._forget()
        if name == "qweight":
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        else:
            self._buffers[name] = tensor

    def store_weight(self, weight: QuantizedWeight) -> None:
        """Put all tensors of a quantized weight in place."""
        for name, tensor in weight.tensors().items():
            self.store(name, tensor)

    def store_activation(self, activation: ActivationScale) -> None:
        """Put the fixed scales of what enters the layer in place."""
        for name, tensor in activation.tensors().items():
            self.store(name, tensor)

    def _forget(self) -> None:
        """What was computed from stored tensors is out of date."""
        self._unpacked = None
        for name in FOUND_NAMES:
            self._drop(name)

    def _found(self, name: str) -> Tensor | None:
        return getattr(self, name, None)

    def _keep(self, name: str, tensor: Tensor) -> Tensor:
        """As a buffer, so that it goes where the layer goes; not stored."""
        self.register_buffer(name, tensor, persistent=False)
        return tensor

    def _drop(self, name: str) -> None:
        if name in self._buffers:
            delattr(self, name)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    @property
    def features(self) -> int:
        """Values per row of the flattened weight."""
        return math.prod(self.weight_shape[1:])

    @property
    def weight(self) -> Tensor:
        """The dequantized weight in the compute dtype, made anew at each access; for code that only looks at it."""
        return self.stored.dequantize(self.compute_dtype)

    def float_weight(self, hidden_states: Tensor) -> Tensor:
        """The weight in the dtype of the input of one product; in eager mode valid until the next product."""
        dtype = hidden_states.dtype
        if self._unpacked is not None and self._unpacked.dtype == dtype:
            return self._unpacked
        if self.scheme.absorbs_outliers:
            weight = self.stored.dequantize(dtype)
        else:
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

    def row_sums(self) -> Tensor:
        """(P, O) int32, sums of the integers of each row, or (G, O) within each group of features that have activation
        scales of their own; kept from the first eager call on."""
        if (found := self._found("_row_sums")) is not None:
            return found
        if torch.compiler.is_compiling():
            return self._sum_rows()
        with torch.inference_mode(False):  # it outlives the call
            return self._keep("_row_sums", self._sum_rows())

    def _sum_rows(self) -> Tensor:
        rows = integer_rows(self.qweight, self.group_scale, self.scheme, self.features)
        if self.scheme.act_group_size is not None:
            parts = rows.split(self.scheme.act_group_size, 1)
        else:
            parts = rows.tensor_split([self.scheme.split], 1) if self.scheme.split else (rows,)
        return torch.stack([part.sum(1, dtype=torch.int32) for part in parts])

    def shift_outputs(self) -> Tensor | None:
        """(O,) float32, what the shift of the inputs adds to the outputs, kept from the first eager call on."""
        if self.act_shift is None:
            return None
        if (found := self._found("_shift_outputs")) is not None:
            return found
        stored = self.stored
        if torch.compiler.is_compiling():
            return shift_outputs(stored.residual(), self.smoothing, self.act_shift)
        with torch.inference_mode(False):  # it outlives the call
            return self._keep("_shift_outputs", shift_outputs(stored.residual(), self.smoothing, self.act_shift))

    def activation_scale(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point (P,) of what enters the layer in this call."""
        assert self.act_scale is not None
        assert self.act_zero_point is not None
        if self.scheme.act_mode == "static":
            return self.act_scale[0], self.act_zero_point[0]
        assert self.step_table is not None, "per-step scales need set_step_table_"
        if torch.compiler.is_compiling():  # a number would be compiled in
            index = self.step_table.index.to(self.act_scale.device).view(1)
            return self.act_scale.index_select(0, index)[0], self.act_zero_point.index_select(0, index)[0]
        row = self.step_table.row()
        return self.act_scale[row], self.act_zero_point[row]

    @property
    def stored(self) -> QuantizedWeight:
        """The stored tensors as one value."""
        return QuantizedWeight(self.scheme, self.weight_shape, **{name: getattr(self, name) for name in STATE_NAMES})

    def memory_bytes(self) -> int:
        """Bytes that this layer holds now, unpacked copy included."""
        tensors = [*self.parameters(recurse=False), *self.buffers(recurse=False)]
        tensors += [] if self._unpacked is None else [self._unpacked]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {name: self._buffers[name] for name in SCALE_NAMES if self._buffers[name] is not None}
        self._unpacked = None
        self._drop("_shift_outputs")  # found anew from what is never cast
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if after is not None and before is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)  # moved, never cast
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.qweight.device)).dtype
        return self

    def extra_repr(self) -> str:
        return f"{tuple(self.weight_shape)}, scheme={self.scheme.name}"


def can_be_smoothed(layer: nn.Module) -> bool:
    """Whether what enters a layer of this kind can be divided by a factor for each channel."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def check_scheme(layer: nn.Module, scheme: Scheme) -> None:
    """Whether a layer of this kind and shape can have this scheme.

    Raises:
        ConfigError: it cannot.
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    kind, (channels, *kernel) = type(layer).__name__, weight.shape[1:]
    if scheme.act_bits < 16 and not isinstance(layer, nn.Linear | nn.Conv2d):
        raise ConfigError(f"{kind} has no integer product for scheme {scheme.name}.", mend="Use act_bits 16 there.")
    if scheme.rank is not None and not isinstance(layer, nn.Linear):
        raise ConfigError(
            f"{kind} cannot have scheme {scheme.name}.", "Only linears have a low-rank branch.", "Leave rank out there."
        )
    if scheme.smooth and not can_be_smoothed(layer):
        raise ConfigError(
            f"{kind} cannot have scheme {scheme.name}.",
            "Only linears, and 2-D convolutions without groups, have smoothing factors.",
            "Leave smooth out there.",
        )
    if scheme.shifted and not isinstance(layer, nn.Linear):
        raise ConfigError(
            f"{kind} cannot have scheme {scheme.name}.", "Only linears shift their inputs.", "Leave shifted out there."
        )
    if scheme.format == "nvfp4" and (not isinstance(layer, nn.Linear) or channels % NVFP4_GROUP):
        raise ConfigError(
            f"scheme {scheme.name} does not fit a {kind} with a weight of shape {tuple(weight.shape)}.",
            f"NVFP4 is for linears whose input features make whole blocks of {NVFP4_GROUP}.",
            "Use integers there.",
        )
    if scheme.act_group_size is not None and (not isinstance(layer, nn.Linear) or channels % scheme.act_group_size):
        raise ConfigError(
            f"scheme {scheme.name} does not fit a {kind} with a weight of shape {tuple(weight.shape)}.",
            "Only linears have activation scales for groups of input features, which must be equal.",
            "Use act_mode dynamic there.",
        )
    if scheme.rank is not None and scheme.rank > min(weight.shape[:2]):
        raise ConfigError(
            f"rank {scheme.rank} is more than a weight of shape {tuple(weight.shape)} can have.",
            mend=f"Use a rank of at most {min(weight.shape[:2])} there.",
        )
    if scheme.split is None:
        return
    if isinstance(layer, nn.Embedding) or math.prod(kernel) != 1 or getattr(layer, "groups", 1) != 1:
        raise ConfigError(
            f"{kind} with a weight of shape {tuple(weight.shape)} cannot be split.",
            "Only linears and 1x1 convolutions have two parts of input channels.",
            "Leave split empty there.",
        )
    if not 0 < scheme.split < channels or channels % (scheme.group_size or 1):
        raise ConfigError(
            f"scheme {scheme.name} does not fit the {channels} input channels of a {kind}.",
            "Both parts of a split hold whole groups, and at least one channel.",
            "Choose another split or group_size.",
        )
