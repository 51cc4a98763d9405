"""What a bundle has beside weights, and a format may not be able to hold."""

from __future__ import annotations

from collections.abc import Collection

from ..core.errors import UnsupportedError
from ..core.manifest import ComponentRecord, Manifest
from ..core.reporter import Reporter


def losses_of(component: str, record: ComponentRecord) -> dict[str, str]:
    """Kind -> what is lost where a format cannot express it."""
    found = {}
    if record.cache is not None:
        found["cache plan"] = f"the cache plan of {component}: every call computes everything"
    if record.pruning is not None and record.pruning.identity_modules:
        names = ", ".join(record.pruning.identity_modules)
        found["identity modules"] = (
            f"that {names} of {component} pass on what enters them: a loader without dacc invents weights for them"
        )
    quantization = record.quantization
    if quantization is None:
        return found
    modes = [scheme.act_mode for scheme in quantization.schemes.values()]
    if "per-step" in modes:
        found["per-step scales"] = (
            f"the activation scales of every step of {component}, whose layers multiply floats then"
        )
    if "static" in modes:
        found["static scales"] = f"the activation scales of {component}, whose layers multiply floats then"
    if quantization.attention is not None:
        found["attention"] = f"the rounding of the products of attention in {component}"
    return found


def check_losses(
    manifest: Manifest | None, components: Collection[str], keeps: Collection[str], *, lossy: bool, reporter: Reporter
) -> list[str]:
    """What will be lost, told as notices.

    Args:
        keeps: kinds of `losses_of` that the format can express.

    Raises:
        UnsupportedError: something would be lost and `lossy` is not given.
    """
    records = manifest.components if manifest else {}
    lost = [
        text
        for name in components
        if name in records
        for kind, text in losses_of(name, records[name]).items()
        if kind not in keeps
    ]
    if lost and not lossy:
        raise UnsupportedError(
            f"this format cannot hold {'; '.join(lost)}.",
            mend="Give --lossy to go on without, or choose another format.",
        )
    for text in lost:
        reporter.notice(f"lost: {text}.")
    return lost
