"""The one exception tree. Each error says what happened, why, and how to mend it; `cli/main.py` turns it into an exit
code. Any exception outside this tree is a bug of ours."""

from __future__ import annotations


class DaccError(Exception):
    """Base of all errors that a user can cause and mend.

    Args:
        what: what happened, with the values that caused it.
        why: the rule that was broken; may be empty when `what` says it all.
        mend: what to do now, as a command or an option where there is one.
    """

    exit_code = 1

    def __init__(self, what: str, why: str = "", mend: str = "") -> None:
        self.what, self.why, self.mend = what, why, mend
        super().__init__(" ".join(part for part in (what, why, mend) if part))


class ConfigError(DaccError):
    """A value or a combination of values is wrong, or the output already exists."""

    exit_code = 2


class ModelError(DaccError):
    """The source is missing, not a pipeline, or not the one that something else was made from."""

    exit_code = 3


class CalibrationError(DaccError):
    """Statistics are missing, stale or not finite."""

    exit_code = 3


class BundleError(DaccError):
    """A folder is damaged: a hash, a shard, a path or the manifest's format does not agree."""

    exit_code = 4


class ResourceError(DaccError):
    """Memory or disk is short, or another run holds the lock."""

    exit_code = 5


class BusyError(ResourceError):
    """Another run holds the lock of an output."""


class QualityError(DaccError):
    """A floor given with --require was missed."""

    exit_code = 6


class UnsupportedError(DaccError):
    """A method, format or device cannot treat this model, or a target cannot be reached."""

    exit_code = 7
