"""The machine that runs this, as a row of the table of targets."""

from __future__ import annotations

import torch

from ..core.target import CPU_FLOAT, CPU_INT8, Target, gpu_of_capability
from .kernels_exact import has_int8_products


def target_here(device: torch.device) -> Target | None:
    """What `device` can multiply; None for accelerators that the table does not hold."""
    if device.type == "cpu":
        return CPU_INT8 if has_int8_products() else CPU_FLOAT
    if device.type == "cuda" and torch.version.hip is None:
        return gpu_of_capability(torch.cuda.get_device_capability(device))
    return None
