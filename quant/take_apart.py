"""Take the weight of a linear apart, W diag(s) = up down + R, round R, and see what that does to the outputs.

The formula is that of runtime/low_rank.py. Letters: O rows, K input features, r rank, N inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..core.scheme import Scheme
from ..runtime.low_rank import add_low_rank, shift_outputs, shifted, smoothed
from ..runtime.weight import QuantizedWeight
from .grid import Grid, find_grid
from .low_rank import low_rank_factors
from .simulate import round_dynamic

ITERATIONS = {True: 1, False: 4}  # of the decomposition: roughly, and as it is stored


@dataclass(frozen=True)
class Layer:
    """A linear, and what it should give."""

    rows: Tensor  # W, (O, K) float32
    scheme: Scheme  # of the residual; inputs are float, or rounded with scales found in each token
    inputs: Tensor  # (N, K) float32
    outputs: Tensor  # (N, O) float32
    shift: Tensor | None = None  # c, (1,): added to inputs before they are rounded

    @classmethod
    def reading(cls, inputs: Tensor, weight: Tensor, scheme: Scheme) -> Layer:
        """A weight (O, K) of any float dtype behind inputs (N, K)."""
        rows = weight.detach().float()
        return cls(rows, scheme.plain, inputs, inputs @ rows.T)

    def shifted(self, shift: float) -> Layer:
        """The same with a constant added to what is rounded."""
        scheme = self.scheme.model_copy(update={"shifted": True})
        return replace(self, scheme=scheme, shift=self.rows.new_full((1,), shift))

    def first(self, count: int) -> Layer:
        """The same, judged on fewer inputs."""
        return replace(self, inputs=self.inputs[:count], outputs=self.outputs[:count])


@dataclass(frozen=True)
class Parts:
    """A weight taken apart, in the precision in which it is stored."""

    smoothing: Tensor | None  # s, (K,)
    up: Tensor | None  # (O, r)
    down: Tensor | None  # (r, K)
    residual: Tensor  # R, (O, K) float32
    grid: Grid  # of R
    rounded: Tensor  # Q(R), (O, K) float32
    shift: Tensor | None  # c, (1,)

    def with_codes(self, codes: Tensor) -> Parts:
        """The residual rounded to other codes (O, K)."""
        scale, zero = self.grid.columns(self.residual.shape[1])
        return replace(self, rounded=(codes - zero) * scale)

    def unrounded(self) -> Parts:
        """The residual as it is: the error that is left is that of rounded inputs."""
        return replace(self, rounded=self.residual)

    def pack(self, codes: Tensor) -> QuantizedWeight:
        """As it is stored, with the codes (O, K) of the residual."""
        rank = None if self.down is None else len(self.down)
        scheme = self.grid.scheme.model_copy(update={"rank": rank, "smooth": self.smoothing is not None})
        packed = replace(self.grid, scheme=scheme).pack(codes, tuple(self.residual.shape))
        return replace(
            packed, smoothing=self.smoothing, low_rank_down=self.down, low_rank_up=self.up, act_shift=self.shift
        )


def take_apart(
    layer: Layer, smoothing: Tensor | None, rank: int, seed: int, *, given: Tensor | None = None, rough: bool = False
) -> Parts:
    """The branch that comes nearest to a smoothed weight, and the nearest rounding of what it leaves.

    Args:
        rank: of the branch, at most what the weight has; 0: there is no branch.
        given: (O, K), what the branch need not stand for, because a rounded residual does.
        rough: quickly, for a first choice.
    """
    whole = layer.rows if smoothing is None else layer.rows * smoothing.float()
    up = down = None
    residual = whole
    if rank:
        left = whole if given is None else whole - given
        up, down = low_rank_factors(left, min(rank, *whole.shape), seed=seed, iterations=ITERATIONS[rough])
        residual = whole - up.float() @ down.float()
    grid = find_grid(residual, layer.scheme, search=not rough)
    return Parts(smoothing, up, down, residual, grid, grid.round(residual), layer.shift)


def error_of(layer: Layer, parts: Parts) -> float:
    """||y - y^||^2 / ||y||^2 over the inputs of a layer, with rounded inputs where its scheme has them."""
    x = entering = smoothed(layer.inputs, parts.smoothing)
    scheme = layer.scheme
    if scheme.act_bits < 16:
        moved = x if layer.shift is None else smoothed(shifted(layer.inputs, layer.shift), parts.smoothing)
        entering = round_dynamic(moved, scheme, per_sample=False)
    y = entering @ parts.rounded.T  # (N, O)
    if layer.shift is not None:
        y -= shift_outputs(parts.rounded, parts.smoothing, layer.shift)
    found = add_low_rank(y, x, parts.down, parts.up)
    return float((found - layer.outputs).square().sum() / layer.outputs.square().sum().clamp(min=1e-30))
