"""Talking to people: stages, progress with time left, notices. It all goes to stderr; stdout carries results only."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from .errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

Item = TypeVar("Item")
LOG_SECONDS = 10.0  # without a terminal: at most one progress line in so many seconds


class Reporter:
    """Writes for a person on stderr and remembers the notices for the manifest.

    Args:
        quiet: print nothing but errors; notices are still remembered.
        verbose: also print details.
        strict: a notice becomes an error.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False, strict: bool = False) -> None:
        self.quiet, self.verbose, self.strict = quiet, verbose, strict
        self.notices: list[str] = []
        self._console: Console | None = None

    @property
    def console(self) -> Console:
        """One rich console on stderr, made at first use."""
        if self._console is None:
            from rich.console import Console

            self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        return self._console

    def say(self, text: str) -> None:
        """A line for the reader."""
        if not self.quiet:
            self.console.print(text, markup=False)

    def detail(self, text: str) -> None:
        """A line that only --verbose shows."""
        if self.verbose:
            self.say(text)

    def notice(self, text: str) -> None:
        """Something was skipped, replaced or approximated. Goes into the manifest as well.

        Raises:
            ConfigError: with --strict.
        """
        if text in self.notices:
            return
        self.notices.append(text)
        if self.strict:
            raise ConfigError(
                f"notice under --strict: {text.rstrip('.')}.", mend="Mend the cause, or run without --strict."
            )
        if not self.quiet:
            self.console.print(f"notice: {text}", style="yellow", markup=False)

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """A named part of the work; its duration is shown with --verbose."""
        started = time.monotonic()
        yield
        self.detail(f"{title}: {time.monotonic() - started:.1f} s")

    def progress(
        self, items: Iterable[Item], title: str | Callable[[], str], total: int | None = None
    ) -> Generator[Item, None, None]:
        """Iterate with a bar (terminal) or an occasional line (log). Close it where it does not come to its end.

        Args:
            title: of the work; a function is asked again after every item, to tell how it goes.
        """
        count = total if total is not None else len(items) if isinstance(items, Sequence) else None

        def told() -> str:
            return title if isinstance(title, str) else title()

        if self.quiet:
            yield from items
        elif self.console.is_terminal:
            yield from self._bar(items, told, count)
        else:
            yield from self._lines(items, told, count)

    def _bar(self, items: Iterable[Item], title: Callable[[], str], count: int | None) -> Iterator[Item]:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            "left",
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(title(), total=count)
            for item in items:
                yield item
                bar.update(task, advance=1, description=title())

    def _lines(self, items: Iterable[Item], title: Callable[[], str], count: int | None) -> Iterator[Item]:
        started = last = time.monotonic()
        for done, item in enumerate(items, start=1):
            yield item
            now = time.monotonic()
            if now - last >= LOG_SECONDS:
                last = now
                left = f", {(now - started) / done * (count - done):.0f} s left" if count else ""
                print(f"{title()}: {done}/{count or '?'}{left}", file=sys.stderr, flush=True)


def silent() -> Reporter:
    """A reporter that prints nothing; the notices can still be read from it."""
    return Reporter(quiet=True)
