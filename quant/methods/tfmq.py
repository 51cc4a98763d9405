"""TFMQ-DM: keep the features of time, and give every step scales of its own (Huang et al., 2024, arXiv 2311.16503).

1. Temporal layers form one unit, which is reconstructed first, on the time steps alone (see `quant/temporal.py`):

       min over rounding of  sum_i ||g_i(h(t)) - g^_i(h^(t))||^2

2. All other units: learned rounding and corrected biases as in `qdiffusion.py`, without the temporal layers in them.
3. Activation scales: a table with one row for each call of the grid ("finite set calibration").

The paper has tables for the temporal activations (`scope=tib`), its code for all of them (`scope=all`). With the latter
the activations of temporal layers stay float here: they are a single row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from ...core.errors import ConfigError
from ...core.families import Family
from ...core.reporter import Reporter
from ...runtime.trajectory import DenoiserCall
from .. import temporal
from ..block import Block, Treated
from ..plan import LayerPlan
from ..reconstruct import ReconstructionConfig, choose_iterations, reconstruct_weights
from ..simulate import RoundedInputs
from ..units import Unit

NEEDS = ("calls",)
UNIT = "block"
ACT_MODE = "per-step"
CALIBRATION = "every-step"
TEMPORAL = True
SPLIT = True
SAMPLES = 16  # of each step


class TFMQConfig(ReconstructionConfig):
    """Fields of `--set`."""

    scope: Literal["all", "tib"] = "all"  # which activations have a scale for every step


CONFIG = TFMQConfig


def temporal_acts(config: TFMQConfig) -> bool:
    """Whether the activations of temporal layers are quantized."""
    return config.scope == "tib"


def check(config: TFMQConfig, act_bits: int, act_mode: str) -> None:
    """Refuse what would do nothing.

    Raises:
        ConfigError: tables for the temporal layers alone, where activations have no tables.
    """
    if config.scope == "tib" and act_mode != "per-step":
        raise ConfigError(
            f"scope=tib is about scales of every step; here activations have {act_bits} bits and mode {act_mode}.",
            mend="Add --act-bits 8 and leave --act-mode out, or leave scope out.",
        )


def decide(
    model: nn.Module,
    units: Sequence[Unit],
    calls: Sequence[DenoiserCall],
    config: TFMQConfig,
    reporter: Reporter,
) -> dict[str, Any]:
    """The number of updates, from the time that one takes here."""
    return {"iterations": choose_iterations(model, units, calls, config, reporter)}


def temporal_block(
    model: nn.Module,
    plans: Sequence[LayerPlan],
    family: Family,
    calls: Sequence[DenoiserCall],
    rounding: RoundedInputs,
    seed: int,
) -> Block | None:
    """The unit that is treated first; None where no such layers are found."""
    network = temporal.find_temporal(model, family, calls)
    return temporal.temporal_block(network, model, plans, calls, rounding, seed) if network else None


def treat(block: Block, config: TFMQConfig, chosen: dict[str, Any]) -> dict[str, Treated]:
    """Quantize the layers of one unit."""
    return reconstruct_weights(block, config, chosen["iterations"])
