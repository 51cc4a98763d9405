"""`dacc quantize --dry-run`: what would happen, from the plan alone; no weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod
from pathlib import Path

from pydantic import Field

from ..calibrate.config import DEFAULT_STEPS
from ..core.calibration import read_calibration
from ..core.config import Config, Document, build_config
from ..core.reporter import Reporter
from ..core.scheme import Scheme
from ..core.source import Source, zoo_entry_of
from ..core.target import execution_of
from ..core.tensor_file import StoredTensor, stored_tensors
from ..runtime.activation import activation_shapes
from ..runtime.weight import state_shapes
from .api import Job, prepare
from .config import METHODS, QuantizeConfig
from .driver import plan_component, traits_of
from .outcome import target_of
from .plan import LayerPlan

FLOAT16_BYTES = 2


class ComponentPreview(Config):
    """What would happen to one model."""

    class_name: str
    parameters: int
    bytes_fp32: int
    bytes_after: int  # tensors of the result, without file headers
    schemes: dict[str, int]  # scheme -> number of layers
    skipped: dict[str, int]  # reason -> number of layers


class Preview(Document):
    """The plan of a whole request."""

    source: str
    method: str
    components: dict[str, ComponentPreview]
    runs_as: dict[str, str] = Field(default_factory=dict)  # scheme -> its products on the target; empty: not known


def preview_quantization(
    source: str | Path | Source | None,
    config: QuantizeConfig,
    *,
    calib: str | Path | None = None,
    device: str = "auto",
    fuse_lora: Sequence[str | Path] = (),
    reporter: Reporter,
) -> Preview:
    """Plan every layer and add up the bytes.

    Args:
        device: where the result would run, unless the config names a target.
        fuse_lora: adapter files; they change no plan, but wrong ones are refused.

    Raises:
        DaccError: as `quantize_pipeline` would, before any weight is read.
    """
    job = prepare(source, config, reporter, calib, fuse_lora)
    components = {name: _preview_component(job, name, reporter) for name in job.components}
    target, schemes = target_of(job.config, device), {name for found in components.values() for name in found.schemes}
    runs_as = {name: execution_of(Scheme.from_name(name), target).how for name in sorted(schemes)} if target else {}
    return Preview(source=job.source.identity, method=job.config.method, components=components, runs_as=runs_as)


def _preview_component(job: Job, name: str, reporter: Reporter) -> ComponentPreview:
    folder, method = job.source.path / name, METHODS.load(job.config.method)
    traits = traits_of(method, build_config(method.CONFIG, **job.config.settings), job.config, _steps(job))
    skeleton, plans = plan_component(folder, job.config, reporter, traits)
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    quantized = {f"{plan.name}.weight" for plan in plans if plan.scheme}
    kept = sum(_float_bytes(tensor) for name, tensor in stored_tensors(folder).items() if name not in quantized)
    return ComponentPreview(
        class_name=type(skeleton).__name__,
        parameters=parameters,
        bytes_fp32=4 * parameters,
        bytes_after=kept + sum(_plan_bytes(plan) for plan in plans),
        schemes=dict(Counter(plan.scheme.name for plan in plans if plan.scheme)),
        skipped=dict(Counter(plan.reason for plan in plans if plan.reason)),
    )


def _steps(job: Job) -> int:
    """Calls of the grid that a table of scales would have a row for."""
    if job.calibration and (record := read_calibration(job.calibration)):
        return len(record.schedule.timesteps)
    entry = zoo_entry_of(job.source)
    return entry.num_inference_steps if entry else DEFAULT_STEPS


def _float_bytes(tensor: StoredTensor) -> int:
    return FLOAT16_BYTES * prod(tensor.shape)


def _plan_bytes(plan: LayerPlan) -> int:
    """Bytes of the stored tensors; scales count as float16."""
    if plan.scheme is None:
        return 0
    total = 0
    for shape, dtype in state_shapes(plan.scheme, plan.shape).values():
        total += prod(shape) * (dtype.itemsize if dtype else FLOAT16_BYTES)
    acts = activation_shapes(plan.scheme).values()
    return total + sum(prod(shape) * dtype.itemsize for shape, dtype in acts)
