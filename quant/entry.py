"""What enters a layer, seen on its way: by place, or by name as diffusers' motion modules give it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Look = Callable[[nn.Module, Tensor], Tensor | None]
Watching = TypeVar("Watching", bound="Watch")


class Watch:
    """Looks at what enters some layers, until it is left; a context manager. See `watch_entry`."""

    def __init__(self, looks: Iterable[tuple[nn.Module, Look]]) -> None:
        self._hooks = [watch_entry(layer, look) for layer, look in looks]

    def __enter__(self: Watching) -> Watching:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()


def watch_entry(layer: nn.Module, look: Look) -> RemovableHandle:
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
