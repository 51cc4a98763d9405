"""One writer per output: a lock file that the operating system frees when its process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from .errors import BusyError, ResourceError


def lock_of(output: Path) -> Path:
    """The lock file of an output folder."""
    return output.with_name(f".{output.name}.lock")


def wait_for_writer(output: Path) -> None:
    """Return once no other run writes an output."""
    try:
        descriptor = os.open(lock_of(output), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # given when the descriptor is closed
    finally:
        os.close(descriptor)


class WriterLock:
    """Holds `path` from `acquire` to `release`. A file left behind by a dead process is no obstacle."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock or refuse at once.

        Raises:
            BusyError: another run holds it.
            ResourceError: the file system has no locks.
        """
        while self._descriptor is None:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.read(descriptor, 32).decode(errors="replace").strip()
                os.close(descriptor)
                raise self._refusal(error, holder) from None
            if self._is_current(descriptor):
                self._descriptor = descriptor
            else:  # the former holder removed this file between our open and our lock
                os.close(descriptor)
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, str(os.getpid()).encode())

    def release(self) -> None:
        """Remove the file while it is still locked, then let go."""
        if self._descriptor is None:
            return
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    def _refusal(self, error: OSError, holder: str) -> ResourceError:
        if not isinstance(error, BlockingIOError):
            return ResourceError(
                f"{self.path} cannot be locked ({error.strerror}).", mend="Write to a file system that has locks."
            )
        who = f" (process {holder})" if holder else ""
        return BusyError(
            f"another run{who} writes this output; it holds {self.path}.",
            mend="Wait for it, or choose another --output.",
        )
