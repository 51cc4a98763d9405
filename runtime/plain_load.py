"""diffusers' own loader says what it leaves out of a bundle: it does not run cache plans."""

from __future__ import annotations

import contextvars
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.errors import DaccError
from ..core.manifest import read_manifest

_LOADED_BY_US: contextvars.ContextVar[bool] = contextvars.ContextVar("dacc_loaded_by_us", default=False)


@contextmanager
def loaded_by_us() -> Iterator[None]:
    """Within, a pipeline with a plan is loaded by somebody who attaches it."""
    token = _LOADED_BY_US.set(True)
    try:
        yield
    finally:
        _LOADED_BY_US.reset(token)


def tell_of_plans(wrapped: Callable[..., Any], _owner: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around `DiffusionPipeline.from_pretrained`: loads as ever, and warns where a local bundle has a plan."""
    pipe = wrapped(*args, **kwargs)
    source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
    if not _LOADED_BY_US.get() and source is not None and os.path.isdir(source) and (names := _planned(Path(source))):
        from .cached import CachePlanWarning

        warnings.warn(
            f"{' and '.join(names)} of {source}: diffusers does not run the cache plan, so that every call computes "
            f"everything. dacc.load({str(source)!r}) runs it.",
            CachePlanWarning,
            stacklevel=2,
        )
    return pipe


def _planned(folder: Path) -> list[str]:
    """The components with a plan; none where there is no manifest, or one that cannot be read."""
    try:
        manifest = read_manifest(folder)
    except DaccError:  # the pipeline is loaded all the same; `dacc verify` and `dacc.load` name what is wrong
        return []
    return [name for name, record in manifest.components.items() if record.cache is not None] if manifest else []
