"""What the study of cache plans compares: pipelines, sources, targets, and rows of `dacc search-cache`. Edit here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dacc.benchmarks.ptq_rows import PIPELINES, WITH_FID

__all__ = ["CACHE_PEERS", "FEWER", "PIPELINES", "ROWS", "SOURCES", "TARGETS", "WITH_FID", "Row"]

UNETS, TRANSFORMERS = ("digits-unet", "shapes-sd"), ("digits-dit", "shapes-mmdit")
TARGETS = {"1.5x": 1.5, "2x": 2.0, "3x": 3.0, "5x": 5.0}  # of the multiply-accumulates of a run
FLOAT = "float"
SOURCES: dict[str, dict[str, int]] = {  # options of `dacc quantize` before the search
    FLOAT: {},
    "W8A8": {"bits": 8, "act_bits": 8},
    "W4A8": {"bits": 4, "act_bits": 8},
}


@dataclass(frozen=True)
class Row:
    """One row: a method of `dacc search-cache` and its fields."""

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    sources: tuple[str, ...] = (FLOAT,)
    pipelines: tuple[str, ...] = PIPELINES
    targets: tuple[str, ...] = tuple(TARGETS)
    slow: bool = False  # measured when it is named
    unit: str = "auto"  # of `--unit`


EVERYWHERE = tuple(SOURCES)
ROWS: dict[str, Row] = {
    "even": Row("deepcache", sources=EVERYWHERE),
    "power law": Row("deepcache", {"form": "code"}),
    "encoder": Row("encoder", pipelines=UNETS),
    "taylor": Row("taylor", sources=EVERYWHERE),
    "taylor, of the body": Row("taylor", targets=("3x", "5x"), unit="body"),
    "taylor, behind a cut": Row("taylor", pipelines=UNETS, targets=("3x", "5x"), unit="cut:0.0"),
    "taylor, even": Row("taylor", {"spacing": "even", "warmup": 2, "order": 1}),
    "taylor, even, order 2": Row("taylor", {"spacing": "even", "warmup": 2}),
    "dp": Row("dp", sources=EVERYWHERE),
    "dp, not corrected": Row("dp", {"correct": False}),
    "dp, neither joint nor corrected": Row(
        "dp", {"joint": False, "correct": False, "trials": 0}, sources=("W8A8", "W4A8")
    ),
    "dp, by features": Row("dp", {"cost": "feature"}),
    "gated": Row("gated", pipelines=TRANSFORMERS),
    "evolve": Row("evolve", slow=True),
}
# caches of other libraries (`cache_peers.py`), and the pipelines that each runs on: diffusers' hooks want a transformer
# with `enable_cache`, which that of DiT has not
CACHE_PEERS: dict[str, tuple[str, ...]] = {
    "DeepCache (package)": UNETS,
    "first-block cache (diffusers)": ("shapes-mmdit",),
    "TaylorSeer (diffusers)": ("shapes-mmdit",),
    "TaylorSeer, lite (diffusers)": ("shapes-mmdit",),
    "DBCache (cache-dit)": TRANSFORMERS,
    "DBCache, TaylorSeer (cache-dit)": TRANSFORMERS,
}
# simply fewer solver steps: with the pipeline's own solver, or with this one in its place
FEWER: dict[str, str | None] = {"fewer steps": None, "fewer steps, DPM++": "DPMSolverMultistepScheduler"}
NO_OTHER_SOLVER = ("shapes-mmdit", "digits-unet")  # a flow; a pipeline that calls its solver as DDIM is called
