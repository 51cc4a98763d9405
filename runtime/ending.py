"""Pipelines whose runs end with their call, and are counted whatever scheduler they have by then."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from .clock import end_run
from .clockwork import attach_clock


@functools.cache
def ending_its_run(base: type) -> type:
    """A subclass of a pipeline class, of the same name, whose calls leave no run behind, also where they fail."""

    @functools.wraps(base.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        attach_clock(self)
        try:
            return base.__call__(self, *args, **kwargs)
        finally:
            end_run(self)

    def __reduce__(self: Any) -> tuple[Any, ...]:
        return _bare, (base,), vars(self)

    members: Mapping[str, Any] = {
        "__call__": __call__,
        "__reduce__": __reduce__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_dacc_cached": True,
    }
    return type(base.__name__, (base,), dict(members))


def _bare(base: type) -> Any:
    """An empty pipeline, filled by copy or pickle."""
    return object.__new__(base)
