"""The damage of a pass, end to end: the new folder against the float source, from the same noise."""

from __future__ import annotations

from pathlib import Path

import psutil

from ..core.manifest import Effect
from ..core.reporter import Reporter
from ..core.source import Source, zoo_entry_of
from .load import load_source
from .request import RunRequest
from .trajectory import measure_effect

FLOAT32_GROWTH = 2  # float16 files take twice their size as float32
COPIES = 1.5  # the reference, and the result with its temporary unpacked layers


def measure_bundle(
    reference: Source, result: Path, *, measure: str, device: str, seed: int, reporter: Reporter
) -> Effect:
    """Sample both pipelines and compare, when both fit in memory and it takes under a minute.

    Args:
        reference: the float pipeline.
        result: folder of the new one.
        measure: "auto" or "never".
    """
    if measure == "never":
        return Effect(not_measured="switched off with --measure never")
    size = sum(file.stat().st_size for file in reference.path.rglob("*.safetensors"))
    needed, available = COPIES * FLOAT32_GROWTH * size, psutil.virtual_memory().available
    if needed > available:
        reporter.say(f"measuring needs about {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are free")
        why = "both pipelines together do not fit in memory"
        reporter.notice(f"the effect on images was not measured: {why}")
        return Effect(not_measured=why)
    pair = [load_source(folder, device=device, cached=False, reporter=reporter) for folder in (reference, result)]
    request = RunRequest(seeds=(seed,)).with_zoo_defaults(zoo_entry_of(reference))
    return measure_effect(*pair, seed=seed, request=request, reporter=reporter)
