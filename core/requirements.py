"""Floors of `--require`: read before any work is done, checked when the effect has been measured."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ConfigError, QualityError
from .manifest import Effect, read_manifest
from .reporter import Reporter

if TYPE_CHECKING:
    from .bundle import BundleWriter

FORM = re.compile(r"^\s*(psnr|ssim|relative_l2)\s*(>=|<=)\s*([0-9]+(?:\.[0-9]*)?(?:e-?[0-9]+)?)\s*$", re.IGNORECASE)

ADVICE = "Use more bits or a smaller group size, or lower the floor."


@dataclass(frozen=True)
class Requirements:
    """Parsed floors: (field of Effect, relation, limit)."""

    floors: tuple[tuple[str, str, float], ...]

    def check(self, effect: Effect, writer: BundleWriter, *, keep: bool) -> None:
        """Refuse to finish when a floor is missed; the result is dropped, or kept beside the output.

        Raises:
            QualityError: a floor is missed, or what it is about was not measured.
        """
        if missed := self._first_missed(effect):
            kept = writer.abandon(keep=keep)
            raise QualityError(missed, f"The result is kept in {kept}." if kept else "Nothing was written.", ADVICE)

    def accept(self, output: Path, reporter: Reporter) -> Path:
        """The bundle of an earlier run of the same command; it stays where it is.

        Raises:
            QualityError: it misses a floor.
        """
        manifest = read_manifest(output)
        assert manifest is not None
        for effect in manifest.passes[-1].effect.values():
            if missed := self._first_missed(effect):
                raise QualityError(missed, f"{output} already holds this result and is left as it is.", ADVICE)
        reporter.say(f"{output} already holds this result; nothing to do")
        return output

    def _first_missed(self, effect: Effect) -> str | None:
        for field, relation, limit in self.floors:
            value: float | None = getattr(effect, field)
            if value is not None and (value >= limit if relation == ">=" else value <= limit):
                continue
            found = f"is {value:.4g}" if value is not None else f"was not measured ({effect.not_measured})"
            return f"{field} {found}; --require asks for {relation} {limit:g}."
        return None


def parse_requirements(texts: tuple[str, ...]) -> Requirements:
    """Read floors such as "psnr>=25".

    Raises:
        ConfigError: another form.
    """
    floors = []
    for text in texts:
        match = FORM.match(text)
        if not match:
            raise ConfigError(
                f"--require {text!r} cannot be read.",
                mend="Write for example 'psnr>=25', 'ssim>=0.9' or 'relative_l2<=0.1'.",
            )
        floors.append((match[1].lower(), match[2], float(match[3])))
    return Requirements(tuple(floors))
