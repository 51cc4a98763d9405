"""Which pipelines can be pruned."""

from __future__ import annotations

from ..core.errors import UnsupportedError
from ..core.manifest import read_manifest
from ..core.reference import find_reference
from ..core.reporter import Reporter
from ..core.source import Source
from ..core.treatable import quantized_by


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
