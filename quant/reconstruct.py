"""Learned rounding of the weights of one unit, against what the float network gives (AdaRound: Nagel et al., 2020,
arXiv 2004.10568; over blocks: BRECQ, Li et al., 2021, arXiv 2102.05426).

    W^ = s * (clip(floor(W / s) + h(a) + z) - z),   h(a) = clip(1.2 sigmoid(a) - 0.1, 0, 1)
    loss = ||y - y^||^2 / ||y||^2 + lambda * mean(1 - |2 h(a) - 1|^beta)

Only a is learned. beta falls from 20 to 2, so that every h ends at 0 or 1. Both terms are means, so that lambda weighs
the same in a small layer and in a large one.

Letters: O rows, K input features per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..core.config import Config
from ..core.reporter import Reporter
from ..runtime.timing import now
from ..runtime.trajectory import DenoiserCall
from ..runtime.weight import to_rows
from .block import Block, Sighting, Treated, outputs_of
from .grid import Grid, find_grid
from .ranges import Finder, Search, roundings_of
from .sequential import Rounded, round_in_turn
from .simulate import RoundedInputs
from .units import Unit
from .walk import Walk

STRETCH, SHIFT = 1.2, 0.1  # of the sigmoid, so that h reaches 0 and 1
LADDER = (20000, 10000, 5000, 2000, 1000, 500, 200, 100, 50)  # round numbers: the choice seldom changes between runs
OVERHEAD = 1.4  # observing, judging and learning scales, against the updates of the rounding
CHECKS = 8  # times that the hard rounding is judged while it is learned


class ReconstructionConfig(Config):
    """Fields of `--set` that all methods with reconstruction share."""

    start: Literal["gptq", "nearest"] = "gptq"  # rounding that learning starts from; nearest: as in the papers
    iterations: int = Field(0, ge=0)  # per unit; more: better, longer; 0: as many as fit into `minutes`
    minutes: float = Field(4.0, gt=0)  # for the whole model, when the iterations are chosen
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
    bias: Tensor | None = None  # (O,) in place of the layer's own


def beta_at(progress: float, warm_up: float) -> float | None:
    """Exponent of the regularization at a share of all iterations; None during the warm-up, when it is off."""
    if progress < warm_up:
        return None
    return 20.0 - 18.0 * (progress - warm_up) / (1 - warm_up)


class _Learner:
    """The rounding variables of one unit and their optimizer."""

    def __init__(self, block: Block, starts: dict[str, Start], config: ReconstructionConfig) -> None:
        self.block, self.config = block, config
        self.biases = {name: start.bias for name, start in starts.items() if start.bias is not None}
        self.soft = {name: SoftRounding(start.rows, start.grid) for name, start in starts.items()}
        self.least = self.error()
        self._strength = config.regularization * self.least**2
        self._optimizer = torch.optim.Adam([rounding.alpha for rounding in self.soft.values()], lr=config.learning_rate)
        self._generator = torch.Generator().manual_seed(block.seed)

    def error(self) -> float:
        """Of the unit with the codes that the variables stand for now."""
        return self.block.error({name: rounding.hard() for name, rounding in self.soft.items()}, self.biases)

    def codes(self) -> dict[str, Tensor]:
        return {name: rounding.codes() for name, rounding in self.soft.items()}

    def update(self, progress: float) -> None:
        """One step on one call.

        Args:
            progress: share of the updates that are done.
        """
        sighting = self.block.drawn(self._generator)
        assert sighting.target is not None
        self._optimizer.zero_grad()
        with torch.enable_grad():
            outputs = self.block.run(sighting, {name: rounding() for name, rounding in self.soft.items()}, self.biases)
            loss = relative_error(outputs, sighting.target)
            if (beta := beta_at(progress, self.config.warm_up)) is not None:
                undecided = torch.stack([rounding.penalty(beta) for rounding in self.soft.values()]).mean()
                loss = loss + self._strength * undecided
            loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()


def reconstruct(
    block: Block, starts: dict[str, Start], config: ReconstructionConfig, iterations: int
) -> dict[str, Tensor]:
    """Codes (O, K) int16 of the layers of a unit.

    The best codes seen are kept; those of the start are among them, so the result is never worse than it.

    Args:
        starts: layer name -> grid and values to start from.
        iterations: updates; each looks at one call.
    """
    learner = _Learner(block, starts, config)
    best, least = learner.codes(), learner.least
    if least == 0:
        return best
    checks = {iterations * (number + 1) // CHECKS for number in range(CHECKS // 2, CHECKS)}
    for iteration in range(iterations):
        learner.update(iteration / iterations)
        if iteration + 1 in checks and (found := learner.error()) < least:
            least, best = found, learner.codes()
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
        name: Start(found.grid, found.wanted, found.treated.bias)
        for name, found in rounded.items()
        if found.grid is not None and found.wanted is not None
    }
    treated = {name: found.treated for name, found in rounded.items()}
    with block.rounding.instead(roundings_of(block, treated)):
        codes = reconstruct(block, starts, config, iterations) if block.sightings and starts else {}
        error = _error(block, starts, codes) if codes else None
    for name, start in starts.items():
        if name in codes:
            weight = start.grid.pack(codes[name], treated[name].weight.shape)
            untouched = config.start == "nearest" and torch.equal(codes[name], start.grid.nearest(start.rows))
            treated[name] = replace(
                treated[name], weight=weight, output_error=error, method="rtn" if untouched else treated[name].method
            )
    return treated


def _to_nearest(block: Block, name: str, found: Rounded) -> Rounded:
    """The same activation scales, the weight at its nearest codes."""
    weight: Tensor = block.layers[name].weight  # type: ignore[assignment]
    if found.grid is None:
        return found
    rows, scheme = to_rows(weight.detach()).float(), found.treated.weight.scheme
    grid = find_grid(rows, scheme, search=True)
    treated = replace(found.treated, weight=grid.pack(grid.nearest(rows), tuple(weight.shape)), bias=None)
    return Rounded(treated, grid, rows)


def choose_iterations(
    model: nn.Module,
    units: Sequence[Unit],
    calls: Sequence[DenoiserCall],
    config: ReconstructionConfig,
    reporter: Reporter,
) -> int:
    """Updates for each unit: as asked, or as many as fit into the time, told by one update of every unit."""
    if config.iterations:
        return config.iterations
    seconds = _seconds_of_update(model, units, calls[0])
    fitting = 60 * config.minutes / (OVERHEAD * seconds)
    chosen = next((count for count in LADDER if count <= fitting), LADDER[-1])
    reporter.say(f"one update of all units takes {seconds:.2f} s here: {chosen} updates each")
    return chosen


def _seconds_of_update(model: nn.Module, units: Sequence[Unit], call: DenoiserCall) -> float:
    """Unit by unit, so that no more memory is needed than later; the second of two updates, when memory is warm."""
    total, device = 0.0, next(model.parameters()).device
    with Walk(model, [call], [unit.name for unit in units]) as walk:
        for unit in units:
            (entering,) = walk.advance(unit.name)
            if entering is None:
                continue
            module = model.get_submodule(unit.name)
            with torch.no_grad():
                target = outputs_of(module(*entering.args, **entering.kwargs))
            sighting = Sighting(call.state, entering, target)
            block = Block(unit.name, module, unit.plans, [sighting], RoundedInputs(model, {}), seed=0)
            starts = {name: _nearest_start(block, name) for name in block.layers if _is_learned(block, name)}
            if not starts:
                continue
            learner = _Learner(block, starts, ReconstructionConfig())
            for _ in range(2):
                started = now(device)
                learner.update(1.0)
            total += now(device) - started
    return max(total, 1e-3)


def _is_learned(block: Block, name: str) -> bool:
    return not isinstance(block.layers[name], nn.Embedding)


def _nearest_start(block: Block, name: str) -> Start:
    weight: Tensor = block.layers[name].weight  # type: ignore[assignment]
    rows = to_rows(weight.detach()).float()
    return Start(find_grid(rows, block.scheme(name), search=False), rows)


def _error(block: Block, starts: dict[str, Start], codes: dict[str, Tensor]) -> float:
    biases = {name: start.bias for name, start in starts.items() if start.bias is not None}
    return block.error({name: _values(codes[name], starts[name].grid) for name in codes}, biases)


def _values(codes: Tensor, grid: Grid) -> Tensor:
    scale, zero = grid.columns(codes.shape[1])
    return (codes - zero) * scale
