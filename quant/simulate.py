"""Quantized arithmetic in float, for the float network of a calibrated method: weights are replaced in place, and
activations are rounded on their way into a layer exactly as the integer kernels round them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.scheme import Scheme
from ..runtime.activation import ActivationScale, round_static
from ..runtime.clock import current_run
from ..runtime.kernels_round import quantize_rows
from ..runtime.low_rank import add_low_rank, along, shifted, smoothed
from ..runtime.weight import QuantizedWeight
from .entry import watch_entry

Rounding = Callable[[Tensor], Tensor]
Branch = Callable[[Tensor], Tensor]  # what a low-rank branch gives for inputs (..., K): (..., O)


class RoundedInputs:
    """Rounds what enters the layers of one model, each in the way that was set for it last; at first not at all."""

    def __init__(self, model: nn.Module, schemes: dict[str, Scheme]) -> None:
        self._ways: dict[str, Rounding] = {}
        self._branches: dict[str, Branch] = {}
        self._taken: dict[str, Tensor] = {}  # what rounding took from the input of a layer with a branch
        for name, scheme in schemes.items():
            if scheme.act_bits < 16:  # hooked now: a call that stands still in front of a layer sees no later hook
                layer = model.get_submodule(name)
                watch_entry(layer, self._round(name, layer))
                layer.register_forward_hook(self._give_back(name, layer))

    def put(self, name: str, rounding: Rounding | None, branch: Branch | None = None) -> None:
        """Round what enters a layer from now on; None: leave it float.

        Args:
            branch: the part of the layer that multiplies its inputs as they are, not rounded.
        """
        for ways, way in ((self._ways, rounding), (self._branches, branch)):
            ways.pop(name, None)
            if way is not None:
                ways[name] = way

    @contextmanager
    def instead(self, roundings: dict[str, Rounding | None]) -> Iterator[None]:
        """Other ways for some layers, for a while."""
        before = dict(self._ways), dict(self._branches)
        for name, rounding in roundings.items():
            self.put(name, rounding)
        try:
            yield
        finally:
            self._ways, self._branches = before

    def _round(self, name: str, own: nn.Module) -> Any:
        def round_input(layer: nn.Module, x: Tensor) -> Tensor | None:
            rounding = self._ways.get(name) if layer is own else None  # a copy of the model has the same hooks
            if rounding is None:
                return None
            rounded = rounding(x)
            if name in self._branches:
                self._taken[name] = x - rounded
            return rounded

        return round_input

    def _give_back(self, name: str, own: nn.Module) -> Any:
        def give_back(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if layer is not own or name not in self._branches or name not in self._taken:
                return None
            return output + self._branches[name](self._taken.pop(name))

        return give_back


def branch_of(weight: QuantizedWeight) -> Branch | None:
    """The low-rank branch of a layer that holds this weight."""
    down, up = weight.low_rank_down, weight.low_rank_up
    if down is None or up is None:
        return None
    smoothing = weight.smoothing  # by itself: the codes need not stay in memory
    return lambda x: add_low_rank(x.new_zeros(()), smoothed(x, smoothing), down, up)


def rounding_before(weight: QuantizedWeight, rounding: Rounding | None, axis: int = -1) -> Rounding | None:
    """The same way of rounding, in a layer that shifts its inputs first and divides them by factors, one for each of
    the channels along `axis`."""
    smoothing, shift = weight.smoothing, weight.act_shift
    if rounding is None or (smoothing is None and shift is None):
        return rounding

    def around(x: Tensor) -> Tensor:
        rounded = rounding(smoothed(shifted(x, shift), smoothing, axis))
        rounded = rounded if smoothing is None else rounded * along(smoothing, x, axis).to(x.dtype)
        return rounded if shift is None else rounded - shift.to(x.dtype)

    return around


def rounding_of(scheme: Scheme, layer: nn.Module, acts: ActivationScale | None) -> Rounding | None:
    """How the kernels round what enters a layer of this scheme; None where activations stay float."""
    if scheme.act_bits == 16:
        return None
    axis = channel_axis(layer)
    if scheme.finds_acts:
        return lambda x: _straight(x, _by_parts(x, axis, scheme.split, _dynamic_part(scheme, layer)))
    if acts is None:
        raise ValueError(f"scheme {scheme.name} needs activation scales")
    return lambda x: _straight(x, _by_parts(x, axis, scheme.split, _fixed_part(scheme, acts)))


def channel_axis(layer: nn.Module) -> int:
    """Where the input channels of a layer lie: last for linears, first after the batch for convolutions."""
    return 1 if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) else -1


def row_now(rows: int) -> int:
    """Row of a step table for the call that is being evaluated; the last row is for all calls."""
    state = current_run()
    return min(state.call, rows - 1) if state else rows - 1


def round_dynamic(x: Tensor, scheme: Scheme, *, per_sample: bool) -> Tensor:
    """x through its integers: one scale per token (..., K) or group of its features, or per sample (N, C, H, W)."""
    rows = x.flatten(1) if per_sample else x.reshape(-1, scheme.act_group_size or x.shape[-1])
    integers, scale, zero = quantize_rows(rows.detach(), scheme.act_max, offset=scheme.act_offset)
    values = integers.float() if zero is None else integers.float() - zero
    return (values * scale).view(x.shape).to(x.dtype)


def _dynamic_part(scheme: Scheme, layer: nn.Module) -> Callable[[Tensor, int], Tensor]:
    per_sample = isinstance(layer, nn.Conv2d)
    return lambda part, _: round_dynamic(part, scheme, per_sample=per_sample)  # groups end where parts end


def _fixed_part(scheme: Scheme, acts: ActivationScale) -> Callable[[Tensor, int], Tensor]:
    def fixed(part: Tensor, number: int) -> Tensor:
        row = row_now(len(acts.scale))
        return round_static(part.detach(), acts.scale[row, number], acts.zero_point[row, number], scheme.act_bits)

    return fixed


def _by_parts(x: Tensor, axis: int, split: int | None, rounding: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Each part of the channels by itself."""
    if split is None:
        return rounding(x, 0)
    parts = x.split([split, x.shape[axis] - split], dim=axis)
    return torch.cat([rounding(part.contiguous(), number) for number, part in enumerate(parts)], dim=axis)


def _straight(x: Tensor, rounded: Tensor) -> Tensor:
    """The rounded values, with the gradient of the values themselves (straight-through estimator)."""
    return x + (rounded - x).detach() if x.requires_grad else rounded


@torch.no_grad()
def put_weight_(layer: nn.Module, weight: QuantizedWeight) -> None:
    """Let a float layer compute with the values of a quantized weight."""
    own: Tensor = layer.weight  # type: ignore[assignment]
    own.copy_(weight.dequantize(own.dtype))


@torch.no_grad()
def put_bias_(layer: nn.Module, bias: Tensor | None) -> None:
    """Let a float layer add a bias as it is stored; None: its own."""
    if bias is not None:
        own: Tensor = layer.bias  # type: ignore[assignment]
        own.copy_(bias)
