"""Which pipelines can be pruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..core.errors import UnsupportedError
from ..core.manifest import read_manifest
from ..core.reference import find_reference
from ..core.reporter import Reporter
from ..core.source import Source, component_entries
from ..core.treatable import quantized_by
from .stacks import counting_fields

if TYPE_CHECKING:
    from .remove import Removal


def float_source(source: Source, components: list[str], reporter: Reporter) -> Source:
    """The float pipeline that a bundle was made from; the source itself where nothing in it is quantized.

    Raises:
        UnsupportedError: it is not on this machine any more.
    """
    if not any(quantized_by(source.path / name) for name in components):
        return source
    found = find_reference(source, reporter)
    if found is None:
        raise UnsupportedError(
            f"the float pipeline that {source.name} was made from is not on this machine with the same weights.",
            mend="Give it as SOURCE.",
        )
    reporter.notice(f"{source.name} is quantized: {found.identity}, which it was made from, is pruned in its place")
    return found


def refuse_treated(source: Source, components: list[str]) -> None:
    """Integers are not cut, and names of a component that lost blocks lead to another one than its own source.

    Raises:
        UnsupportedError: a component is quantized, or was pruned.
    """
    manifest = read_manifest(source.path)
    origin = f" ({manifest.source.name})" if manifest else ""
    for name in components:
        if method := quantized_by(source.path / name):
            raise UnsupportedError(
                f"{name} of {source.name} is quantized by {method}.",
                "Blocks are removed from the float network, and the rest is quantized then.",
                f"Run dacc prune on the float source{origin}, or give --from-reference.",
            )
        record = manifest.components.get(name) if manifest else None
        if record and record.pruning:
            raise UnsupportedError(
                f"{name} of {source.name} was pruned before, by {record.pruning.method}.",
                "Its blocks are no longer numbered as those of its source.",
                f"Prune the source{origin} with a larger --ratio.",
            )


def refuse_other_residuals(source: Source, class_name: str, config: Mapping[str, Any], removal: Removal) -> None:
    """A ControlNet gives one residual for every block, and those beyond what is left would be added in wrong places.

    Args:
        class_name: of the denoiser.
        config: its fields before the removal.

    Raises:
        UnsupportedError: the pipeline has a ControlNet, and the denoiser would read another number of residuals.
    """
    nets = [name for name, (_, kind) in component_entries(source.path).items() if "ControlNet" in kind]
    changed = [name for name in counting_fields(class_name) if removal.config[name] != config[name]]
    if nets and changed:
        raise UnsupportedError(
            f"{nets[0]} of {source.name} gives a residual for every block of its {class_name}, and {changed[0]} would "
            f"change from {config[changed[0]]} to {removal.config[changed[0]]}.",
            "Diffusers would add the residuals in other places without a word.",
            "Prune the pipeline without its ControlNet; of a U-Net the middle alone, or blocks of attentions, may go.",
        )
