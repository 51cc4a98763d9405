"""Learned rounding of the weights of one unit, against what the float network gives (AdaRound: Nagel et al., 2020,
arXiv 2004.10568; over blocks: BRECQ, Li et al., 2021, arXiv 2102.05426).

    W^ = s * (clip(floor(W / s) + h(a) + z) - z),   h(a) = clip(1.2 sigmoid(a) - 0.1, 0, 1)
    loss = ||y - y^||^2 / ||y||^2 + lambda * mean(1 - |2 h(a) - 1|^beta)

Only a is learned. beta falls from 20 to 2, so that every h ends at 0 or 1. Both terms are means, so that lambda weighs
the same in a small layer and in a large one.

Letters: O rows, K input features per row.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from ..core.config import Config
from ..core.reporter import Reporter
from ..runtime.clock import fixed_run
from ..runtime.trajectory import DenoiserCall
from ..runtime.weight import from_rows, to_rows
from .block import Block, Treated, outputs_of
from .grid import Grid, find_grid
from .plan import LayerPlan
from .ranges import Finder, Search, roundings_of
from .sequential import Rounded, round_in_turn

STRETCH, SHIFT = 1.2, 0.1  # of the sigmoid, so that h reaches 0 and 1
LADDER = (20000, 10000, 5000, 2000, 1000, 500, 200, 100, 50)  # round numbers: the choice seldom changes between runs
OVERHEAD = 1.4  # observing, judging and learning scales, against the updates of the rounding
CHECKS = 8  # times that the hard rounding is judged while it is learned


class ReconstructionConfig(Config):
    """Fields of `--set` that all methods with reconstruction share."""

    start: Literal["gptq", "nearest"] = "gptq"  # rounding that learning starts from; nearest: as in the papers
    iterations: int = Field(0, ge=0)  # per unit; more: better, longer; 0: as many as fit into `minutes`
    minutes: float = Field(8.0, gt=0)  # for the whole model, when the iterations are chosen
    learning_rate: float = Field(3e-3, gt=0)  # of Adam on the rounding variables
    regularization: float = Field(0.3, ge=0)  # lambda, against the error that nearest rounding has
    warm_up: float = Field(0.2, ge=0, lt=1)  # share of the iterations without regularization


class SoftRounding(nn.Module):
    """Codes of one weight between two neighbours.

    Args:
        rows: (O, K) values to round.
        grid: scales and zero points; they stay as they are.
    """

    def __init__(self, rows: Tensor, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.scale, self.zero = grid.columns(rows.shape[1])
        ratio = rows.float() / self.scale
        self.floor = ratio.floor()
        share = (ratio - self.floor).clamp(1e-4, 1 - 1e-4)
        self.alpha = nn.Parameter(-torch.log(STRETCH / (share + SHIFT) - 1))

    def share(self) -> Tensor:
        """h(a): how far above the lower neighbour, (O, K) in [0, 1]."""
        return (STRETCH * torch.sigmoid(self.alpha) - SHIFT).clamp(0, 1)

    def forward(self) -> Tensor:
        """The soft weight, (O, K) float32."""
        codes = (self.floor + self.share() + self.zero).clamp(*self.grid.scheme.code_range)
        return (codes - self.zero) * self.scale

    def penalty(self, beta: float) -> Tensor:
        """mean(1 - |2h - 1|^beta): 0 when every code has decided."""
        return 1 - (2 * self.share() - 1).abs().pow(beta).mean()

    @torch.no_grad()
    def codes(self) -> Tensor:
        """The codes that the variables have decided for, (O, K) int16."""
        hard = self.floor + (self.alpha >= 0) + self.zero
        return hard.clamp(*self.grid.scheme.code_range).to(torch.int16)

    @torch.no_grad()
    def hard(self) -> Tensor:
        """The weight that these codes stand for, (O, K) float32."""
        return (self.codes() - self.zero) * self.scale


@dataclass(frozen=True)
class Start:
    """Where the rounding of one layer starts."""

    grid: Grid
    rows: Tensor  # (O, K) values whose nearest codes are the start


def beta_at(progress: float, warm_up: float) -> float | None:
    """Exponent of the regularization at a share of all iterations; None during the warm-up, when it is off."""
    if progress < warm_up:
        return None
    return 20.0 - 18.0 * (progress - warm_up) / (1 - warm_up)


def reconstruct(
    block: Block, starts: dict[str, Start], config: ReconstructionConfig, iterations: int
) -> dict[str, Tensor]:
    """Codes (O, K) int16 of the layers of a unit.

    The best codes seen are kept; those of the start are among them, so the result is never worse than it.

    Args:
        starts: layer name -> grid and values to start from.
        iterations: updates; each looks at one call.
    """
    soft = {name: SoftRounding(start.rows, start.grid) for name, start in starts.items()}
    best = {name: rounding.codes() for name, rounding in soft.items()}
    least = block.error({name: rounding.hard() for name, rounding in soft.items()})
    if iterations == 0 or least == 0:
        return best
    optimizer = torch.optim.Adam([rounding.alpha for rounding in soft.values()], lr=config.learning_rate)
    generator = torch.Generator().manual_seed(block.seed)
    strength = config.regularization * least**2
    checks = {iterations * (number + 1) // CHECKS for number in range(CHECKS // 2, CHECKS)}
    for iteration in range(iterations):
        sighting = block.drawn(generator)
        assert sighting.target is not None
        optimizer.zero_grad()
        outputs = block.run(sighting, {name: rounding() for name, rounding in soft.items()})
        loss = relative_error(outputs, sighting.target)
        if (beta := beta_at(iteration / iterations, config.warm_up)) is not None:
            loss = loss + strength * torch.stack([rounding.penalty(beta) for rounding in soft.values()]).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if iteration + 1 in checks:
            found = block.error({name: rounding.hard() for name, rounding in soft.items()})
            if found < least:
                least, best = found, copy.deepcopy({name: rounding.codes() for name, rounding in soft.items()})
    return best


def relative_error(outputs: tuple[Tensor, ...], targets: tuple[Tensor, ...]) -> Tensor:
    """||y - y^||^2 / ||y||^2, the mean over the outputs of a unit."""
    parts = [
        (mine - wanted).square().mean() / wanted.square().mean().clamp(min=1e-30)
        for mine, wanted in zip(outputs, targets, strict=True)
    ]
    return torch.stack(parts).mean()


def reconstruct_weights(
    block: Block, config: ReconstructionConfig, iterations: int, search: Search | Finder = "mse"
) -> dict[str, Treated]:
    """Quantize the layers of a unit: rounded in turn or to nearest, then learned; with their activation scales.

    Tables that are looked up go to nearest.
    """
    rounded = round_in_turn(block, search)
    if config.start == "nearest":
        rounded = {name: _to_nearest(block, name, found) for name, found in rounded.items()}
    starts = {
        name: Start(found.grid, found.wanted)
        for name, found in rounded.items()
        if found.grid is not None and found.wanted is not None
    }
    treated = {name: found.treated for name, found in rounded.items()}
    with block.rounding.instead(roundings_of(block, treated)):
        codes = reconstruct(block, starts, config, iterations) if block.sightings else {}
        error = block.error({name: _values(codes[name], starts[name].grid) for name in codes}) if codes else None
    for name, start in starts.items():
        if name in codes:
            weight = start.grid.pack(codes[name], treated[name].weight.shape)
            treated[name] = replace(treated[name], weight=weight, output_error=error)
    return treated


def _to_nearest(block: Block, name: str, found: Rounded) -> Rounded:
    """The same activation scales, the weight at its nearest codes."""
    weight: Tensor = block.layers[name].weight  # type: ignore[assignment]
    if found.grid is None:
        return found
    rows, scheme = to_rows(weight.detach()).float(), found.treated.weight.scheme
    grid = find_grid(rows, scheme, search=True)
    treated = replace(found.treated, weight=grid.pack(grid.nearest(rows), tuple(weight.shape)))
    return Rounded(treated, grid, rows)


def choose_iterations(
    model: nn.Module,
    plans: Sequence[LayerPlan],
    calls: Sequence[DenoiserCall],
    config: ReconstructionConfig,
    reporter: Reporter,
) -> int:
    """Updates for each unit: as asked, or as many as fit into the time, told by one update of all units together."""
    if config.iterations:
        return config.iterations
    seconds = _seconds_of_update(model, [plan for plan in plans if plan.scheme], calls[0])
    fitting = 60 * config.minutes / (OVERHEAD * seconds)
    chosen = next((count for count in LADDER if count <= fitting), LADDER[-1])
    reporter.say(f"an update of all units takes {seconds:.2f} s here: {chosen} updates each")
    return chosen


def _seconds_of_update(model: nn.Module, plans: Sequence[LayerPlan], call: DenoiserCall) -> float:
    """The second time, when memory is warm."""
    soft = {}
    for plan in plans:
        layer = model.get_submodule(plan.name)
        if plan.scheme and not isinstance(layer, nn.Embedding):
            rows = to_rows(layer.weight.detach()).float()  # type: ignore[operator]
            soft[plan] = SoftRounding(rows, find_grid(rows, plan.scheme, search=False))
    optimizer = torch.optim.Adam([rounding.alpha for rounding in soft.values()])
    for _ in range(2):
        started = time.perf_counter()
        weights = {f"{plan.name}.weight": from_rows(rounding(), plan.shape) for plan, rounding in soft.items()}
        with fixed_run(call.state), torch.enable_grad():
            outputs = outputs_of(functional_call(model, weights, call.args, dict(call.kwargs)))
            loss = torch.stack([output.square().mean() for output in outputs]).sum()
            (loss + sum(rounding.penalty(2.0) for rounding in soft.values())).backward()
        optimizer.step()
    return time.perf_counter() - started


def _values(codes: Tensor, grid: Grid) -> Tensor:
    scale, zero = grid.columns(codes.shape[1])
    return (codes - zero) * scale
