"""accelerate, which moves products to 16 bits and back-propagates on every device that it knows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ...core.errors import ConfigError, UnsupportedError
from .config import Precision

if TYPE_CHECKING:
    from accelerate import Accelerator


@contextmanager
def accelerated(device: torch.device, precision: Precision) -> Iterator[Accelerator]:
    """An accelerator for one training; accelerate is left as it was found, its settings hold for a whole process.

    Raises:
        ConfigError: the process has set accelerate up otherwise.
        UnsupportedError: the process is one of several.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    free = PartialState._shared_state == {}
    try:
        found = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16" if precision == "bf16" else "no")
    except ValueError as error:
        raise ConfigError(
            f"accelerate is set up in this process already, and not for precision={precision}: {error}",
            mend="Run recovery in a process of its own.",
        ) from None
    try:
        if found.num_processes > 1:
            raise UnsupportedError("recovery runs in one process.", mend="Start dacc without accelerate launch.")
        yield found
    finally:
        if free:
            AcceleratorState._reset_state(reset_partial_state=True)
