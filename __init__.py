"""dacc: offline compression of Hugging Face diffusers pipelines.

This face is light: names are resolved at first use. When diffusers is imported, before or after dacc, the quantization
method registers itself, and diffusers' own loader is made to say that it does not run the cache plan of a bundle.
"""

from __future__ import annotations

import importlib
from typing import Any

import wrapt

__version__ = "0.1.0"

_FACE = {
    "CalibrateConfig": "calibrate.config",
    "EvaluateConfig": "evaluate.config",
    "ExportConfig": "export.config",
    "PruneConfig": "prune.config",
    "QuantizeConfig": "quant.config",
    "SearchCacheConfig": "cache.config",
    "attach_clock": "runtime.clockwork",
    "calibrate_pipeline": "calibrate.api",
    "current_run": "runtime.clock",
    "evaluate_pipelines": "evaluate.api",
    "export_pipeline": "export.api",
    "inspect_pipeline": "evaluate.inspection",
    "load": "runtime.load",
    "no_cache": "runtime.installed",
    "open_calibration": "calibrate.store",
    "prune_pipeline": "prune.api",
    "quantize_pipeline": "quant.api",
    "search_cache": "cache.api",
    "verify_bundle": "core.verify",
}

__all__ = [
    "CalibrateConfig",
    "EvaluateConfig",
    "ExportConfig",
    "PruneConfig",
    "QuantizeConfig",
    "SearchCacheConfig",
    "attach_clock",
    "calibrate_pipeline",
    "current_run",
    "evaluate_pipelines",
    "export_pipeline",
    "inspect_pipeline",
    "load",
    "no_cache",
    "open_calibration",
    "prune_pipeline",
    "quantize_pipeline",
    "search_cache",
    "verify_bundle",
]


def __getattr__(name: str) -> Any:
    if name in _FACE:
        return getattr(importlib.import_module(f".{_FACE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


@wrapt.when_imported("diffusers.quantizers.auto")
def _register(_module: Any) -> None:
    from .runtime.diffusers_quantizer import register

    register()


@wrapt.when_imported("diffusers.pipelines.pipeline_utils")
def _tell_of_plans(module: Any) -> None:
    from .runtime.plain_load import tell_of_plans

    wrapt.wrap_function_wrapper(module, "DiffusionPipeline.from_pretrained", tell_of_plans)
