"""Q-Diffusion: reconstruct block by block on inputs from all time steps, with two scales where a shortcut joins (Li et
al., 2023, arXiv 2302.04304).

1. Weights: learned rounding of each block against the float block (AdaRound, see `quant/reconstruct.py`).
2. Split shortcut: the skip convolution of an up block reads [X1; X2] with very different ranges; weights and
   activations of each half have scales of their own, where that lowers the error:

       y = s_x1 s_w1 (Q(X1) . Q(W1)) + s_x2 s_w2 (Q(X2) . Q(W2))

3. Activations: one static scale for each layer, found over all time steps and then learned, the rounding fixed.

Unlike the paper, learning starts from the rounding of GPTQ, biases are corrected, and scales are learned on what the
quantized network gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field
from torch import nn

from ...core.reporter import Reporter
from ...runtime.trajectory import DenoiserCall
from ..block import Block, Treated
from ..learn_scales import learn_scales
from ..ranges import quantized_weights
from ..reconstruct import ReconstructionConfig, choose_iterations, reconstruct_weights
from ..units import Unit

NEEDS = ("calls",)
UNIT = "block"
ACT_MODE = "static"
SPLIT = True


class QDiffusionConfig(ReconstructionConfig):
    """Fields of `--set`."""

    act_iterations: int = Field(-1, ge=-1)  # updates of the activation scales; -1: a quarter of `iterations`
    act_learning_rate: float = Field(2e-3, gt=0)  # of Adam on the logarithm of the scales


CONFIG = QDiffusionConfig


def decide(
    model: nn.Module,
    units: Sequence[Unit],
    calls: Sequence[DenoiserCall],
    config: QDiffusionConfig,
    reporter: Reporter,
) -> dict[str, Any]:
    """The number of updates, from the time that one takes here."""
    return {"iterations": choose_iterations(model, units, calls, config, reporter)}


def treat(block: Block, config: QDiffusionConfig, chosen: dict[str, Any]) -> dict[str, Treated]:
    """Quantize the layers of one unit."""
    iterations = chosen["iterations"]
    treated = reconstruct_weights(block, config, iterations)
    updates = iterations // 4 if config.act_iterations < 0 else config.act_iterations
    with quantized_weights(block, treated):
        return learn_scales(block, treated, updates, config.act_learning_rate)
