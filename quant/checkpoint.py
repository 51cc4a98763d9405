"""Where a long training keeps its state, so that an interrupted one goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.bundle import BundleWriter


@dataclass(frozen=True)
class Checkpoint:
    """One unit of the journal that never becomes part of the component."""

    writer: BundleWriter
    name: str

    def save(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Replace what was kept before."""
        self.writer.save_unit(self.name, {name: values.cpu() for name, values in tensors.items()}, record)

    def load(self, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was kept last, there; None at the start."""
        if self.name not in self.writer.finished_units():
            return None
        tensors = {name: kept.load().to(device) for name, kept in self.writer.unit_tensors(self.name).items()}
        return tensors, dict(self.writer.unit_record(self.name))
