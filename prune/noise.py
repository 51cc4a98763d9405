"""How a network's input, its output, noise and clean samples are related, from the scheduler's config.

With s the noise level that the run clock tells (noise over signal; flow schedulers: their sigma), x0 a clean sample and
e noise, what enters the network is (x0 + s e) / sqrt(1 + s^2), for flow schedulers (1 - s) x0 + s e.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from ..core.safe_read import read_json
from ..runtime.clock import RunState

Target = Literal["epsilon", "v_prediction", "sample", "flow"]


@dataclass(frozen=True)
class Noise:
    """What a network predicts."""

    target: Target = "epsilon"
    is_plain: bool = True  # inputs and outputs are as above; EDM schedulers scale them in another way

    def clean_factor(self, state: RunState | None) -> float:
        """By how much an error of the output moves the clean sample that it stands for; 1 where that is not known."""
        if state is None or state.sigma is None or self.target == "sample" or not self.is_plain:
            return 1.0
        level = state.sigma
        if self.target == "v_prediction":
            return level / (1 + level**2) ** 0.5
        return level

    def ratio(self, level: float) -> float:
        """Noise over signal."""
        return level / max(1 - level, 1e-6) if self.target == "flow" else level

    def level_at(self, ratio: float) -> float:
        """The noise level with this ratio of noise over signal."""
        return ratio / (1 + ratio) if self.target == "flow" else ratio

    def mixed(self, clean: Tensor, noise: Tensor, level: float) -> Tensor:
        """What enters the network at a noise level."""
        if self.target == "flow":
            return (1 - level) * clean + level * noise
        return (clean + level * noise) / (1 + level**2) ** 0.5

    def wanted(self, clean: Tensor, noise: Tensor, level: float) -> Tensor:
        """What it should give then."""
        if self.target == "flow":
            return noise - clean
        if self.target == "v_prediction":
            return (noise - level * clean) / (1 + level**2) ** 0.5
        return clean if self.target == "sample" else noise

    def clean(self, entered: Tensor, output: Tensor, level: float) -> Tensor:
        """The clean sample that an output stands for."""
        if self.target == "flow":
            return entered - level * output
        if self.target == "v_prediction":
            return (entered - level * output) / (1 + level**2) ** 0.5
        return output if self.target == "sample" else (1 + level**2) ** 0.5 * entered - level * output


def noise_of(pipeline: Path) -> Noise:
    """Of a pipeline folder; without a readable scheduler: noise itself."""
    file = pipeline / "scheduler" / "scheduler_config.json"
    config: Any = read_json(file) if file.is_file() else {}
    name, target = str(config.get("_class_name")), config.get("prediction_type", "epsilon")
    if "FlowMatch" in name or config.get("use_flow_sigmas") or target == "flow_prediction":
        return Noise("flow")
    return Noise(target if target in get_args(Target) else "epsilon", is_plain=not name.startswith("EDM"))
