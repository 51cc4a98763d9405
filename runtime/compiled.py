"""Modules that are compiled one by one while hooks stand before them.

`module.compile()` compiles the whole call, hooks included, whose decisions differ from call to call: graphs would break
or be compiled anew. Here hooks stand outside, and what they call in turn is compiled.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


class Outside:
    """Stands in the place of a module's compiled call: runs its hooks, the innermost of which runs what is compiled."""

    def __init__(self, module: Any) -> None:
        self._module, self._hooked = module, module.forward
        self._innermost: Any = module._diffusers_hook._fn_refs[0]
        self._field = "forward" if self._innermost.original_forward is None else "original_forward"
        self._own = getattr(self._innermost, self._field)
        self.take_()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._hooked(*args, **kwargs)

    def take_(self) -> None:
        """Stand where the compiled call is now."""
        setattr(self._innermost, self._field, self._module._compiled_call_impl)
        self._module.forward = self._own  # what is compiled calls this
        self._module._compiled_call_impl = self

    def give_back_(self) -> None:
        """Put everything back where it was."""
        if self._module._compiled_call_impl is self:  # else it was compiled again, or no longer
            self._module._compiled_call_impl = getattr(self._innermost, self._field)
        setattr(self._innermost, self._field, self._own)
        self._module.forward = self._hooked


class CompiledModules:
    """The hooked modules of a denoiser, which may be compiled at any time.

    Args:
        modules: all that have hooks but the denoiser itself.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules: list[Any] = list(modules)
        self._outside: dict[Any, Outside] = {}

    def step_outside_(self) -> None:
        """Let hooks stand outside of what was compiled since."""
        for module in self._modules:
            compiled = module._compiled_call_impl
            if compiled is None or isinstance(compiled, Outside):
                continue
            if module in self._outside:
                self._outside[module].take_()
            else:
                self._outside[module] = Outside(module)

    def give_back_(self) -> None:
        """Leave compiled modules as they were compiled."""
        for outside in self._outside.values():
            outside.give_back_()
        self._outside.clear()
