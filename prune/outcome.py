"""What a person is told of a result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.manifest import Effect
from ..core.reporter import Reporter

if TYPE_CHECKING:
    from .run import Pruned

NO_PRODUCT = 0.25 * 0.95  # share of the parameters from which on nobody should do without recovery


def tell_of_size(pruned: dict[str, Pruned], reporter: Reporter) -> None:
    """A notice where much is gone and nothing was trained."""
    for name, own in pruned.items():
        share = 1 - own.record.parameters_after / own.record.parameters_before
        if share >= NO_PRODUCT and own.record.recovery is None:
            reporter.notice(
                f"{name} lost {share:.0%} of its parameters and nothing was trained to make up for them: "
                "expect visibly worse results"
            )


def summarize(pruned: dict[str, Pruned], effect: Effect, reporter: Reporter) -> None:
    """The closing lines on stderr."""
    for name, own in pruned.items():
        record = own.record
        gone = [unit for unit, found in record.units.items() if found.removed]
        share = 1 - record.parameters_after / record.parameters_before
        reporter.say(
            f"{name}: {record.parameters_before / 1e6:.2f} M parameters -> {record.parameters_after / 1e6:.2f} M "
            f"({share:.1%} fewer), without {', '.join(gone[:6])}{' and more' if len(gone) > 6 else ''}"
        )
        if record.identity_modules:
            reporter.say(f"{name}: its config cannot tell this: load it with dacc.load, or after `import dacc`")
    if effect.not_measured:
        reporter.say(f"difference to the source: not measured ({effect.not_measured})")
    else:
        reporter.say(
            f"difference to the source: relative L2 {effect.relative_l2:.4f}, PSNR {effect.psnr:.1f} dB, "
            f"SSIM {effect.ssim:.4f} ({effect.seeds} seeds, {effect.steps} steps)"
        )
