"""An output folder grows in a hidden sibling and is renamed into place in one step at the end.

Finished units are journalled there, so that the same command goes on where an interrupted one stopped; a lock keeps a
second writer out. `core/bundle.py` makes pipelines in this way, `calibrate/store.py` calibration sets.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import ConfigError, DaccError, ResourceError
from .folder import check_replaceable, restore_interrupted_swap, swap_in
from .journal import Journal
from .lock import WriterLock, lock_of
from .reporter import Reporter
from .tensor_file import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

Writer = TypeVar("Writer", bound="OutputWriter")


def chosen_output(given: str | Path | None, default: str | Path) -> Path:
    """The folder to make: the one that was asked for, else the default.

    Raises:
        ConfigError: an empty text, which as a path would be the current folder.
    """
    if given == "":
        raise ConfigError("the output is empty.", mend="Name a folder, or leave it out for the default.")
    return Path(default if given is None else given)


@contextmanager
def only_writer(output: Path) -> Iterator[None]:
    """Keep other runs from writing an output; its parent folder is made where it is missing.

    Raises:
        BusyError: another run writes it.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = WriterLock(lock_of(output))
    lock.acquire()
    try:
        restore_interrupted_swap(output)
        yield
    finally:
        lock.release()


def check_output(source: Path, output: Path, *, overwrite: bool) -> None:
    """Refuse a bad output before any work is done.

    Raises:
        ConfigError: the output exists (without `overwrite`), is not ours to delete, or lies in or around the source.
    """
    source, output = source.resolve(), Path(os.path.abspath(output))
    real = output.parent.resolve() / output.name
    if real.is_relative_to(source) or source.is_relative_to(real):
        raise ConfigError(
            f"the output {output} and the source {source} lie in each other.", mend="Choose another --output."
        )
    check_replaceable(output, overwrite=overwrite)


class OutputWriter:
    """Makes one output folder, atomically and resumably.

    Args:
        source: the pipeline folder that is read.
        output: the folder to make.
        run_key: identity of the run; decides whether units of an interrupted run can be used.
        arithmetic: what these units must have been made with besides; no part of the result's identity.
        overwrite: an old folder at `output` is exchanged for the new one, at the very end.
        resume: use finished units of an interrupted run.
        reporter: where to speak.
    """

    def __init__(
        self,
        source: Path,
        output: Path,
        *,
        run_key: str,
        reporter: Reporter,
        arithmetic: Sequence[str] = (),
        overwrite: bool = False,
        resume: bool = True,
    ) -> None:
        check_output(source, output, overwrite=overwrite)
        self.source, self.output = source.resolve(), Path(os.path.abspath(output))
        self.run_key, self.reporter = run_key, reporter
        self._overwrite, self._resume = overwrite, resume
        self._partial = self.output.with_name(f".{self.output.name}.partial")
        self.folder = self._partial / "bundle"  # the output as it grows
        self._journal = Journal(self._partial / "units", " ".join([run_key, *arithmetic]))
        self._workplaces: list[Path] = []
        self._lock = WriterLock(lock_of(self.output))
        self._closed = False

    def __enter__(self: Writer) -> Writer:
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            restore_interrupted_swap(self.output)
            check_output(self.source, self.output, overwrite=self._overwrite)
            self._prepare()
            self._open_partial()
        except BaseException as error:
            self._lock.release()
            _raise_if_disk(error, self.output)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not self._closed:
                self._leave_unfinished(hopeless=isinstance(error, DaccError) and not isinstance(error, ResourceError))
        finally:
            self._lock.release()
        _raise_if_disk(error, self.output)

    def finished_units(self) -> set[str]:
        """Names of the units that this run, or the interrupted run before it, has saved."""
        return self._journal.names()

    def save_unit(self, name: str, tensors: Mapping[str, StoredTensor | Tensor], record: Any) -> None:
        """Keep one finished unit.

        Args:
            name: whatever names it among the units of this run.
            tensors: names -> values.
            record: anything JSON can hold; `unit_record` gives it back, also after a resume.
        """
        self._journal.save(name, tensors, record)

    def unit_record(self, name: str) -> Any:
        """The record saved with a unit."""
        return self._journal.record(name)

    def unit_tensors(self, name: str) -> dict[str, StoredTensor]:
        """The tensors saved with a unit, to be read when needed."""
        return self._journal.tensors(name)

    def write_text(self, name: str, text: str) -> None:
        """Write one text file of the output."""
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")

    def check_disk(self, needed: int) -> None:
        """Refuse what cannot fit.

        Raises:
            ResourceError: the output's disk has fewer than `needed` bytes free.
        """
        free = shutil.disk_usage(self.output.parent).free
        if needed > free:
            raise ResourceError(
                f"{self.output} needs about {needed / 1e9:.1f} GB; its disk has {free / 1e9:.1f} GB free.",
                mend="Free some space, or choose an --output on another disk.",
            )

    # for subclasses

    def _prepare(self) -> None:
        """What is to be checked once the output is locked, before anything is written."""

    def _put_in_place(self) -> Path:
        """Rename the finished folder to the output."""
        check_output(self.source, self.output, overwrite=self._overwrite)
        swap_in(self.folder, self.output)
        self._close()
        return self.output

    def _close(self) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)
        self._closed = True

    def workplace(self, name: str) -> Path:
        """A folder in which a part of the run keeps what it needs to go on by itself; gone when the output is complete.

        It is not made here.
        """
        self._workplaces.append(self._partial / name)
        return self._workplaces[-1]

    # inside

    def _open_partial(self) -> None:
        if self._partial.exists() and not (self._resume and self._journal.belongs_to_run()):
            self.reporter.say(f"discarding the unfinished run in {self._partial}")
            shutil.rmtree(self._partial)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._journal.open(resume=self._resume)
        self.folder.mkdir(parents=True)
        if self._journal.names():
            self.reporter.say(f"going on with {len(self._journal.names())} finished units of the interrupted run")

    def _leave_unfinished(self, *, hopeless: bool) -> None:
        """After an error or Ctrl-C: keep what a second try can use, nothing else."""
        finished = 0 if hopeless else len(self._journal.files())
        begun = not hopeless and any(place.is_dir() for place in self._workplaces)
        shutil.rmtree(self.folder if finished or begun else self._partial, ignore_errors=True)
        if finished or begun:
            kept = " and ".join([f"{finished} finished units"] * bool(finished) + ["what was begun"] * begun)
            self.reporter.say(f"{kept} are kept in {self._partial}; the same command again goes on from there")


def _raise_if_disk(error: BaseException | None, output: Path) -> None:
    """Name a disk that is full or closed to us, which is nobody's bug."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise ResourceError(
            f"the disk of {output} is full.", mend="Free some space and run the same command again."
        ) from error
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        raise ResourceError(f"{output} cannot be written ({error}).", mend="Choose another --output.") from error
