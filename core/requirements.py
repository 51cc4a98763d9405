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

LOWER = {  # command -> what brings its result nearer to the source
    "quantize": "Use more bits or a smaller group size, or lower the floor.",
    "prune": "Give a smaller --ratio, train what is left with --recover STEPS, or lower the floor.",
    "search-cache": "Give a smaller --speedup or a larger --macs-ratio, or lower the floor.",
}
UNMEASURED = "Mend what kept it from being measured, or leave --require out and look at the result with dacc evaluate."


@dataclass(frozen=True)
class Requirements:
    """Parsed floors: (field of Effect, relation, limit), and the command whose result they are for."""

    floors: tuple[tuple[str, str, float], ...]
    command: str

    def check(self, effect: Effect, writer: BundleWriter, *, keep: bool) -> None:
        """Refuse to finish when a floor is missed; the result is dropped, or kept beside the output.

        Raises:
            QualityError: a floor is missed, or what it is about was not measured.
        """
        if missed := self._first_missed(effect):
            kept = writer.abandon(keep=keep)
            what_is_left = f"The result is kept in {kept}." if kept else "Nothing was written."
            raise QualityError(missed, what_is_left, self._advice(effect))

    def accept(self, output: Path, reporter: Reporter) -> Path:
        """The bundle of an earlier run of the same command; it stays where it is.

        Raises:
            QualityError: it misses a floor.
        """
        manifest = read_manifest(output)
        assert manifest is not None
        for effect in manifest.passes[-1].effect.values():
            if missed := self._first_missed(effect):
                as_it_is = f"{output} already holds this result and is left as it is."
                raise QualityError(missed, as_it_is, self._advice(effect))
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

    def _advice(self, effect: Effect) -> str:
        """What to do about a floor that was missed."""
        unmeasured = any(getattr(effect, field) is None for field, _, _ in self.floors)
        return UNMEASURED if unmeasured else LOWER[self.command]


def parse_requirements(texts: tuple[str, ...], command: str, *, measure: str) -> Requirements:
    """Read floors such as "psnr>=25".

    Args:
        texts: what was given.
        command: the one whose result they are for.
        measure: "never" is refused together with floors: no work could reach them.

    Raises:
        ConfigError: another form, or nothing will be measured.
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
    if floors and measure == "never":
        raise ConfigError(
            f"--require {texts[0]!r} is about what --measure never leaves unmeasured.",
            mend="Leave --measure never out, or --require.",
        )
    return Requirements(tuple(floors), command)
