"""What one denoiser call costs, as a whole and block by block."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..core.config import Config
from ..runtime.layers import count_parameters
from ..runtime.macs import count_macs
from ..runtime.trajectory import DenoiserCall

REPEATS = 10
WHOLE = ""  # stands for the denoiser itself


class BlockCost(Config):
    """One part of a denoiser that the others do not contain."""

    name: str
    class_name: str
    parameters: int
    parameter_share: float  # of the denoiser's
    time_share: float  # of a call; 0: it did not run


def profile_call(denoiser: nn.Module, call: DenoiserCall) -> dict[str, Any]:
    """Fields of a component: `macs_per_call`, `seconds_per_call`, `blocks` in the order in which they run."""
    macs = count_macs(lambda: call.replay(denoiser))
    blocks = dict(top_blocks(denoiser))
    spent: dict[str, list[float]] = {}
    with ExitStack() as stack:
        for name, block in [*blocks.items(), (WHOLE, denoiser)]:
            for handle in _watch(name, block, spent):
                stack.callback(handle.remove)
        for _ in range(REPEATS):
            call.replay(denoiser)
    total = spent.pop(WHOLE)
    parameters = count_parameters(denoiser)
    order = dict.fromkeys([*spent, *blocks])
    # shares of sums, not of medians: on a busy machine the medians of the parts do not add up to that of the whole
    return {
        "macs_per_call": macs,
        "seconds_per_call": statistics.median(total),
        "blocks": tuple(_cost(name, blocks[name], sum(spent.get(name, ())) / sum(total), parameters) for name in order),
    }


def top_blocks(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts right below the denoiser that hold weights, those of lists one by one."""
    for name, child in denoiser.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{index}", block) for index, block in enumerate(child))
        elif next(child.parameters(), None) is not None:
            yield name, child


def _cost(name: str, block: nn.Module, time_share: float, parameters: int) -> BlockCost:
    own = count_parameters(block)
    return BlockCost(
        name=name,
        class_name=type(block).__name__,
        parameters=own,
        parameter_share=own / max(parameters, 1),
        time_share=time_share,
    )


def _watch(name: str, module: nn.Module, spent: dict[str, list[float]]) -> tuple[Any, Any]:
    """Hooks that append the seconds of every call of `module` to `spent[name]`."""
    started: list[float] = []

    def before(*_: Any) -> None:
        started.append(_now(module))

    def after(*_: Any) -> None:
        spent.setdefault(name, []).append(_now(module) - started.pop())

    return module.register_forward_pre_hook(before), module.register_forward_hook(after)


def _now(module: nn.Module) -> float:
    first = next(module.parameters(), None)
    if first is not None and first.is_cuda:
        torch.cuda.synchronize(first.device)
    return time.perf_counter()
