"""EfficientDM: train what was quantized through low-rank adapters that fold into the integers (He et al., 2024, ICLR,
arXiv 2310.03270).

    y = Q(x; s_x[step]) Q(W0 + B A; s_w),   loss = ||e - e^||^2 / ||e||^2 over the outputs e of the whole network

1. Every unit is rounded in turn as in GPTQ, with activation scales for every call of the grid. The few layers that
   suffer most from low bits keep 8 of them; the paper leaves them float.
2. A, B, s_w, s_x and the biases are trained against the float network on the float pipeline's own samples, data-free
   (see `quant/distill.py`). Rounding passes gradients straight through.
   - QALoRA: B A has rank r and starts at 0; it is added before rounding, so that only integers remain.
   - Scale-aware learning rate: the rate of A and B of a layer is proportional to its mean weight scale; the same share
     of the integers changes in layers of small and of large weights.
   - TALSQ: each call of the grid has an activation scale of its own, which only that call trains.

Unlike the paper, W0 has the rounding of step 1 from the start, and zero points stay as they are.
Letters: O output channels, K input features per row, r rank, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from ...core.families import Family, find_family
from ...core.reporter import Reporter
from ...runtime.clock import fixed_run
from ...runtime.timing import now
from ...runtime.trajectory import DenoiserCall
from ...runtime.weight import QuantizedWeight, from_rows, scale_columns, spread, to_rows
from ..block import Block, Treated, outputs_of
from ..checkpoint import Checkpoint
from ..distill import DistillConfig, Student, check_trainable, distill, fitting_updates
from ..grid import find_grid
from ..learn_scales import LearnedScale, round_straight
from ..plan import LayerPlan
from ..reconstruct import ReconstructionConfig, reconstruct_weights
from ..simulate import channel_axis
from ..units import Unit

NEEDS = ("calls",)
UNIT = "block"
ACT_MODE = "per-step"
CALIBRATION = "every-step"

INSIDE = 0.45  # of a step: how far a value may lie from its code and still round to it
ROUNDING = ReconstructionConfig()  # of step 1: in turn, nothing learned
Base = Literal["cell", "quantized", "float"]


class EfficientDMConfig(DistillConfig):
    """Fields of `--set`."""

    rank: int = Field(32, ge=1)  # of the adapters; larger: more can change, slower
    # W0; quantized: the values of step 1. float: the float weights, rounded anew. cell: the values nearest to the float
    # weights that round as in step 1
    base: Base = "cell"
    learning_rate: float = Field(3e-2, gt=0)  # of Adam on A and B, for a weight scale of 1
    scale_learning_rate: float = Field(1e-3, ge=0)  # on the logarithm of the weight scales
    act_learning_rate: float = Field(1e-2, ge=0)  # on the logarithm of the activation scales
    bias_learning_rate: float = Field(3e-4, ge=0)  # on the biases of the layers
    scale_aware: bool = True  # off: `learning_rate` times the mean scale of all layers, the same for each
    spare: bool = True  # shortcuts and down-sampling convolutions keep at least 8 bits


CONFIG = EfficientDMConfig


def spares(config: EfficientDMConfig) -> bool:
    """Whether the family's sensitive layers have more bits (the paper leaves them float)."""
    return config.spare


class QALoRA(nn.Module):
    """A weight W0 + B A on its way to integers. Codes and scales can be learned; zero points and multipliers stay.

    Args:
        base: W0, (O, K) float32.
        start: the grid, and the scales to start from.
        generator: draws A.
    """

    def __init__(self, base: Tensor, start: QuantizedWeight, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, features = base.shape
        self.base, self.start, self.features = base, start, features
        rank = min(rank, rows, features)
        drawn = torch.rand(rank, features, generator=generator).to(base.device)  # on the CPU: the same everywhere
        self.down = nn.Parameter((2 * drawn - 1) / features**0.5)  # A
        self.up = nn.Parameter(base.new_zeros(rows, rank))  # B
        self.growth = nn.Parameter(base.new_zeros(start.scale.shape))  # logarithm of s / its start
        zero = start.zero_point
        self.zero = 0.0 if zero is None else spread(zero.float(), features, start.scheme.split)

    def scale(self) -> Tensor:
        """s in its stored precision, (O, G) float32."""
        wide = self.start.scale.float() * self.growth.exp()
        return wide + (wide.to(self.start.scale.dtype).float() - wide).detach()

    def codes(self, columns: Tensor) -> Tensor:
        """Integers (O, K) as floats, with the gradient of what they were rounded from."""
        ratio = (self.base + self.up @ self.down) / columns
        return (round_straight(ratio) + self.zero).clamp(*self.start.scheme.code_range)

    def columns(self) -> Tensor:
        """What one step of every code is worth, (O, K)."""
        return scale_columns(self.scale(), self.start.group_scale, self.start.scheme, self.features)

    def forward(self) -> Tensor:
        columns = self.columns()
        return (self.codes(columns) - self.zero) * columns

    @torch.no_grad()
    def result(self) -> QuantizedWeight:
        """Integers and scales; nothing is left of the adapter."""
        start = self.start
        return QuantizedWeight.from_codes(
            self.codes(self.columns()).to(torch.int16),
            start.scheme,
            start.shape,
            scale=self.scale().to(start.scale.dtype),
            zero_point=start.zero_point,
            group_scale=start.group_scale,
        )


def base_of(kind: Base, rows: Tensor, start: QuantizedWeight) -> Tensor:
    """W0, (O, K).

    Args:
        rows: the float weight, (O, K).
    """
    if kind == "float":
        return rows
    rounded = to_rows(start.dequantize())
    if kind == "quantized":
        return rounded
    step = scale_columns(start.scale, start.group_scale, start.scheme, rows.shape[1])
    return rounded + ((rows - rounded) / step).clamp(-INSIDE, INSIDE) * step


def student_of(block: Block, starts: dict[str, Treated], config: EfficientDMConfig) -> Student:
    """Adapters and biases for all layers but tables and those that embed the time; learned scales for all that have
    fixed ones."""
    family, _ = find_family(type(block.module).__name__)
    generator = torch.Generator().manual_seed(block.seed)
    weights, scales, biases = {}, {}, {}
    for name, layer in block.layers.items():
        found, scheme = starts[name], starts[name].weight.scheme
        if found.acts is not None:
            scales[name] = LearnedScale(found.acts, scheme.act_bits, channel_axis(layer), scheme.split)
        if _is_trained(family, name, layer):
            base = base_of(config.base, _float_rows(block, name), found.weight)
            weights[name] = QALoRA(base, found.weight, config.rank, generator)
            own: Tensor | None = layer.bias if found.bias is None else found.bias  # type: ignore[assignment]
            if own is not None:
                biases[name] = nn.Parameter(own.detach().float().clone())
    return Student(weights, scales, biases, rates_of(weights, scales, biases, config))


def _is_trained(family: Family, name: str, layer: nn.Module) -> bool:
    return not isinstance(layer, nn.Embedding) and not family.is_embedder(name)


def _float_rows(block: Block, name: str) -> Tensor:
    assert block.reference is not None
    weight: Tensor = block.reference.get_submodule(name).weight  # type: ignore[assignment]
    return to_rows(weight.detach()).float()


def rates_of(
    weights: dict[str, QALoRA],
    scales: dict[str, LearnedScale],
    biases: dict[str, nn.Parameter],
    config: EfficientDMConfig,
) -> list[tuple[list[nn.Parameter], float]]:
    """Which parameters learn how fast."""
    steps = {name: float(weight.columns().detach().mean()) for name, weight in weights.items()}
    if not config.scale_aware:
        steps = dict.fromkeys(steps, sum(steps.values()) / max(1, len(steps)))
    adapters = [([weight.down, weight.up], config.learning_rate * steps[name]) for name, weight in weights.items()]
    rows = [row for scale in scales.values() for row in scale.rows]
    others = [
        ([weight.growth for weight in weights.values()], config.scale_learning_rate),
        (rows, config.act_learning_rate),
        (list(biases.values()), config.bias_learning_rate),
    ]
    return adapters + [group for group in others if group[0]]


def decide(
    model: nn.Module,
    units: Sequence[Unit],
    calls: Sequence[DenoiserCall],
    config: EfficientDMConfig,
    reporter: Reporter,
) -> dict[str, Any]:
    """The number of updates, from the time that one takes here."""
    plans = [plan for unit in units for plan in unit.plans]
    family, _ = find_family(type(model).__name__)
    check_trainable([plan for plan in plans if _is_trained(family, plan.name, model.get_submodule(plan.name))])
    if config.updates:
        return {"updates": config.updates}
    return {"updates": fitting_updates(_seconds_of_update(model, plans, calls[0], config), config, reporter)}


def _seconds_of_update(
    model: nn.Module, plans: Sequence[LayerPlan], call: DenoiserCall, config: EfficientDMConfig
) -> float:
    """The second time, when memory is warm."""
    weights, generator, device = {}, torch.Generator().manual_seed(0), next(model.parameters()).device
    for plan in plans:
        layer = model.get_submodule(plan.name)
        if plan.scheme and not isinstance(layer, nn.Embedding):
            rows = to_rows(layer.weight.detach()).float()  # type: ignore[operator]
            grid = find_grid(rows, plan.scheme, search=False)
            weights[plan] = QALoRA(rows, grid.pack(grid.nearest(rows), plan.shape), config.rank, generator)
    for _ in range(2):
        started = now(device)
        values = {f"{plan.name}.weight": from_rows(weight(), plan.shape) for plan, weight in weights.items()}
        with fixed_run(call.state), torch.enable_grad():
            outputs = outputs_of(functional_call(model, values, call.args, dict(call.kwargs)))
            torch.stack([output.square().mean() for output in outputs]).sum().backward()  # type: ignore[no-untyped-call]
    return now(device) - started


def treat(block: Block, config: EfficientDMConfig, chosen: dict[str, Any]) -> dict[str, Treated]:
    """Quantize the layers of one unit."""
    return reconstruct_weights(block, ROUNDING, 0)


def finish(
    block: Block,
    starts: dict[str, Treated],
    config: EfficientDMConfig,
    chosen: dict[str, Any],
    checkpoint: Checkpoint,
    reporter: Reporter,
) -> dict[str, Treated]:
    """Train the whole network."""
    student = student_of(block, starts, config)
    return distill(block, starts, student, config, chosen["updates"], checkpoint, reporter)
