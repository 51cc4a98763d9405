"""Adapters that were made for a whole denoiser, read for one that lost blocks.

An adapter finds its layers by names, in which the blocks of the whole denoiser are counted. What is left of a pruned
one has other numbers: without care a matrix would be added to the block that took the place of its own. Here names
follow their blocks, and what was for removed ones is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from accelerate import init_empty_weights

from ..core.block_names import Keep, new_name
from ..core.manifest import Manifest, PruningRecord

PATTERNS = ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules")  # of a file's own description


@dataclass(frozen=True)
class Pruned:
    """A component that lost blocks."""

    keep: Keep
    identity: frozenset[str]  # modules that pass on what enters them
    before: frozenset[str]  # modules of the whole one
    after: frozenset[str]
    config: Mapping[str, Any]  # of the whole one

    def lost(self, name: str) -> str | None:
        """The removed module of the whole denoiser that a tensor or module belongs to; None for what is left, and for
        what the whole one does not have."""
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            module = ".".join(parts[:length])
            new = new_name(module, self.keep, ())
            if new is None or new in self.identity or (module in self.before and new not in self.after):
                return module
        return None

    def renamed(self, name: str) -> str:
        """The name of something that is not lost."""
        return new_name(name, self.keep, ()) or name


@dataclass
class Translation:
    """How the names of one adapter were read."""

    components: Mapping[str, Pruned]
    lost: dict[str, str] = field(default_factory=dict)  # tensor of the adapter -> the removed module

    def tensors(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """Tensors, or other values, by their names with the component in front: those of what is left."""
        left = {}
        for full, value in found.items():
            component, _, name = full.partition(".")
            pruned = self.components.get(component)
            if pruned and (module := pruned.lost(name)):
                self.lost[full] = f"{component}.{module}"
                continue
            left[f"{component}.{pruned.renamed(name)}" if pruned else full] = value
        return left

    def description(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """What a file says of itself; layers that it names follow their blocks."""
        told = {}
        for full, value in found.items():
            component, _, key = full.partition(".")
            pruned = self.components.get(component)
            told[full] = _followed(value, pruned) if pruned and key in PATTERNS else value
        return told


def _followed(value: Any, pruned: Pruned) -> Any:
    """The names in a table or list; a `^` in front says that a name is whole."""

    def new(name: str) -> str:
        bare = name.removeprefix("^")
        return name[: len(name) - len(bare)] + pruned.renamed(bare)

    def stays(name: str) -> bool:
        return pruned.lost(name.removeprefix("^")) is None

    if isinstance(value, Mapping):
        return {new(name): one for name, one in value.items() if stays(name)}
    if isinstance(value, list | tuple | set):
        return [new(name) for name in value if stays(name)]
    return value


def pruned_components(pipe: Any, manifest: Manifest | None) -> dict[str, Pruned]:
    """The components of a loaded bundle that lost blocks; none of a pipeline that is no bundle."""
    records = manifest.components if manifest else {}
    return {name: _pruned(getattr(pipe, name), one.pruning) for name, one in records.items() if one.pruning}


def _pruned(model: Any, record: PruningRecord) -> Pruned:
    config = {key: value for key, value in model.config.items() if key != "quantization_config"}
    config |= {key: change.before for key, change in record.config.items()}
    with init_empty_weights():
        whole = type(model).from_config(config)
    before, after = (frozenset(name for name, _ in one.named_modules()) for one in (whole, model))
    return Pruned(record.keep, frozenset(record.identity_modules), before, after, whole.config)


@contextmanager
def reading_for(pipe: Any, components: Mapping[str, Pruned]) -> Iterator[Translation]:
    """Meanwhile the pipeline reads adapters as ones of the whole denoisers; all its loaders ask `lora_state_dict`."""
    translation, own = Translation(components), pipe.lora_state_dict
    if not components:
        yield translation
        return
    pipe.lora_state_dict = _translating(own, translation)
    try:
        yield translation
    finally:
        del pipe.lora_state_dict


def _translating(own: Callable[..., Any], translation: Translation) -> Callable[..., Any]:
    def read(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("unet_config") is not None and "unet" in translation.components:
            kwargs["unet_config"] = translation.components["unet"].config  # other programs count blocks by it
        found = own(*args, **kwargs)
        parts = list(found) if isinstance(found, tuple) else [found]
        tables = (
            parts[:-1] if kwargs.get("return_lora_metadata") else parts
        )  # tensors, and where there are some, alphas
        told = [translation.tensors(one) if one else one for one in tables]
        told += [translation.description(one) if one else one for one in parts[len(tables) :]]
        return tuple(told) if isinstance(found, tuple) else told[0]

    return read
