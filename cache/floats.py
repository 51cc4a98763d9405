"""The float pipeline that a quantized source was made from, as the search compares with it."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from ..core.manifest import read_manifest
from ..core.reporter import Reporter
from ..runtime.load import load_source
from .api import Job


class FloatReference:
    """Loads it when it is needed.

    Args:
        pipe: the source, whose device it shares.
    """

    def __init__(self, job: Job, pipe: Any, reporter: Reporter) -> None:
        self._job, self._device, self._reporter = job, str(pipe.device), reporter
        self._manifest = read_manifest(job.source.path)

    def pipeline(self, component: str) -> Any | None:
        """The float pipeline; None for a component that is not quantized, and, with a notice, where it is not found or
        has other blocks."""
        if not self.is_quantized(component):
            return None
        assert self._manifest is not None
        if self._manifest.components[component].pruning is not None:
            self._reporter.notice(
                f"{component} was pruned before it was quantized: the search compares with the quantized network "
                "itself, without its rounding errors"
            )
            return None
        if self._job.reference is None:
            self._reporter.notice(
                f"the float pipeline {self._manifest.source.name} of {component} was not found: the search compares "
                "with the quantized network itself, without its rounding errors"
            )
            return None
        return self._loaded

    def is_quantized(self, component: str) -> bool:
        """Whether a component of the source is."""
        record = self._manifest.components.get(component) if self._manifest else None
        return record is not None and record.quantization is not None

    @cached_property
    def _loaded(self) -> Any:
        assert self._job.reference is not None
        return load_source(
            self._job.reference,
            device=self._device,
            dtype=self._job.config.dtype,
            cached=False,
            reporter=self._reporter,
        )
