"""A unit of the network as calibrated methods see it: its layers, what enters it, and what it should give.

The inputs come from the network that is quantized up to here, the targets from the float network, so a unit can make up
for what its predecessors lost ("asymmetric" reconstruction: Nagel et al., 2020, arXiv 2004.10568, section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from ..core.scheme import Scheme
from ..runtime.activation import ActivationScale
from ..runtime.clock import RunState, fixed_run
from ..runtime.weight import QuantizedWeight, from_rows
from .plan import LayerPlan
from .simulate import RoundedInputs
from .walk import UnitInput

JUDGED = 24  # calls at most that the error of a unit is taken from


@dataclass(frozen=True)
class Treated:
    """What a method made of one layer."""

    weight: QuantizedWeight
    acts: ActivationScale | None = None  # for schemes with fixed activation scales
    method: str | None = None  # what rounded it, where that is not the method of the pass
    output_error: float | None = None
    bias: Tensor | None = None  # (O,) in place of the layer's own, in 16 bits as it is stored; None: its own

    def tensors(self) -> dict[str, Tensor]:
        """All that is stored of the layer, by short names."""
        acts = self.acts.tensors() if self.acts else {}
        return self.weight.tensors() | acts | ({} if self.bias is None else {"bias": self.bias})

    @classmethod
    def from_tensors(cls, found: dict[str, Tensor], scheme: Scheme, shape: tuple[int, ...], **facts: Any) -> Treated:
        """The reverse of `tensors`."""
        found = dict(found)
        bias = found.pop("bias", None)
        acts = ActivationScale(found.pop("act_scale"), found.pop("act_zero_point")) if "act_scale" in found else None
        return cls(QuantizedWeight(scheme, shape, **found), acts, bias=bias, **facts)


@dataclass(frozen=True)
class Sighting:
    """One call in which the unit runs."""

    state: RunState | None
    entering: UnitInput
    target: tuple[Tensor, ...] | None = None  # what the float network gives here; None where no method asks for it
    intact: UnitInput | None = None  # what enters the unit in the float network
    weight: float = 1.0  # of its error among those of all calls

    @property
    def call(self) -> int:
        """Where on the grid."""
        return self.state.call if self.state else 0


@dataclass(frozen=True)
class Block:
    """One unit, its weights still float."""

    name: str
    module: nn.Module
    plans: tuple[LayerPlan, ...]  # layers to quantize here
    sightings: Sequence[Sighting]
    rounding: RoundedInputs  # of the activations, by layer
    seed: int  # of this unit
    reference: nn.Module | None = None  # the unit of the float network
    merged: Sequence[Sighting] = ()  # the same inputs in larger pieces, for learning; empty: the sightings are as good

    def drawn(self, generator: torch.Generator) -> Sighting:
        """One to learn from."""
        pieces = self.merged or self.sightings
        return pieces[int(torch.randint(len(pieces), (1,), generator=generator))]

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The layers to quantize, by their names in the network."""
        return {plan.name: self.module.get_submodule(self.inside(plan.name)) for plan in self.plans}

    def scheme(self, name: str) -> Scheme:
        """The planned scheme of a layer."""
        found = next(plan.scheme for plan in self.plans if plan.name == name)
        assert found is not None
        return found

    def run(
        self,
        sighting: Sighting,
        rows: Mapping[str, Tensor] | None = None,
        biases: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """The outputs of the unit in one call.

        Args:
            rows: weights to use instead of the module's own, (O, K) each, by layer name.
            biases: likewise, (O,) each.
        """
        instead = {}
        for name, values in (rows or {}).items():
            layer = self.module.get_submodule(self.inside(name))
            instead[self._key(name, "weight")] = from_rows(values, tuple(layer.weight.shape))  # type: ignore[arg-type]
        for name, values in (biases or {}).items():
            instead[self._key(name, "bias")] = values.float()
        with fixed_run(sighting.state):
            entering = sighting.entering
            return outputs_of(functional_call(self.module, instead, entering.args, dict(entering.kwargs)))

    def _key(self, name: str, kind: str) -> str:
        inside = self.inside(name)
        return f"{inside}.{kind}" if inside else kind

    def error(self, rows: Mapping[str, Tensor] | None = None, biases: Mapping[str, Tensor] | None = None) -> float:
        """||y - y^|| / ||y|| over some sightings, always the same ones, that have a target, with their weights; see
        `run`."""
        wrong = power = 0.0
        with torch.no_grad():
            for sighting in some_sightings(self.sightings, JUDGED):
                if sighting.target is not None:
                    for mine, wanted in zip(self.run(sighting, rows, biases), sighting.target, strict=True):
                        wrong += sighting.weight * float((mine - wanted).square().sum(dtype=torch.float64))
                        power += sighting.weight * float(wanted.square().sum(dtype=torch.float64))
        return (wrong / max(power, 1e-30)) ** 0.5

    @contextmanager
    def kept(self) -> Iterator[None]:
        """The weights and biases of the layers to quantize are afterwards as they are now."""
        before = [
            (own, own.detach().clone())
            for layer in self.layers.values()
            for own in (layer.weight, getattr(layer, "bias", None))
            if isinstance(own, Tensor)
        ]
        try:
            yield
        finally:
            with torch.no_grad():
                for own, values in before:
                    own.copy_(values)

    def only(self, plans: Sequence[LayerPlan]) -> Block:
        """The same unit with fewer layers to treat."""
        return replace(self, plans=tuple(plans))

    def inside(self, name: str) -> str:
        """Name of a layer as the unit knows it; empty when the unit is that layer."""
        if not self.name:
            return name
        return name[len(self.name) + 1 :] if name != self.name else ""


def some_sightings(sightings: Sequence[Sighting], most: int) -> Sequence[Sighting]:
    """At most so many, always the same ones, drawn at random: every n-th one would see the same calls of the grid."""
    if len(sightings) <= most:
        return sightings
    chosen = torch.randperm(len(sightings), generator=torch.Generator().manual_seed(0))[:most].sort().values
    return [sightings[index] for index in chosen.tolist()]


def outputs_of(output: Any) -> tuple[Tensor, ...]:
    """The tensors that a module gives: one, or several for blocks of two streams."""
    return tuple(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())
