"""What enters a layer, seen on its way: by place, or by name as diffusers' motion modules give it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def watch_entry(layer: nn.Module, look: Callable[[nn.Module, Tensor], Tensor | None]) -> RemovableHandle:
    """Call `look` with a layer and what enters it, each time before it runs. A tensor that it returns enters instead.

    Returns:
        What removes the hook again.
    """

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        instead = look(layer, args[0] if args else kwargs["input"])
        if instead is None:
            return None
        return ((instead, *args[1:]), kwargs) if args else (args, {**kwargs, "input": instead})

    return layer.register_forward_pre_hook(before, with_kwargs=True)
