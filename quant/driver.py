"""Quantize one component: walk its layers, hand each weight to the method, store what comes back.

Weights are read layer by layer from the files and each finished layer goes to disk at once, so peak memory follows the
largest layer and an interrupted run goes on where it stopped. The network itself is only built on the meta device.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate.sensitivity import call_sensitivity
from ..calibrate.store import CalibrationSet
from ..core.bundle import BundleWriter
from ..core.config import Config, build_config
from ..core.errors import ModelError
from ..core.families import find_family
from ..core.manifest import FORMAT, AttentionRecord, ComponentRecord, ModuleRecord, QuantizationRecord, StepRecord
from ..core.reporter import Reporter
from ..core.safe_read import resolve_shards
from ..core.scheme import Scheme
from ..core.seeds import named_seed
from ..core.tensor_file import StoredTensor, stored_tensors
from ..core.treatable import identity_modules_of
from ..runtime.attention import SOFTMAX_BITS, attention_modules
from ..runtime.load import pick_device
from ..runtime.skeleton import build_skeleton
from .api import Job
from .block import Treated
from .calibrated import first_names, quantize_units
from .config import QuantizeConfig
from .layerwise import weight_error_of
from .plan import LayerPlan, Traits, integers_instead, plan_layers, ungrouped, without_groups
from .treatment import Treatment, load_float, six_digits, treating_device

WIDE = ("F32", "F64")
FLOATS = ("F16", "BF16", *WIDE)


def quantize_component(
    job: Job,
    name: str,
    method: ModuleType,
    writer: BundleWriter,
    device: str,
    reporter: Reporter,
    calibration: CalibrationSet | None = None,
) -> ComponentRecord:
    """Quantize one model into the writer. Hash and size of the result are filled in at the end.

    Args:
        calibration: what enters the model, for methods that need it; the others go layer by layer.
    """
    folder = job.source.path / name
    method_config = build_config(method.CONFIG, **job.config.settings)
    target = pick_device(device)
    traits = traits_of(method, method_config, job.config, len(calibration.schedule.timesteps) if calibration else 1)
    skeleton, plans = plan_component(folder, job.config, reporter, traits)
    stored = stored_tensors(folder)
    skeleton._fix_state_dict_keys_on_load(stored)  # type: ignore[operator]  # names of old attention blocks
    _check_kept(stored, skeleton, plans)
    chosen: dict[str, int | float | str] = {}
    if calibration:
        _check_treated(stored, plans)
        family, _ = find_family(type(skeleton).__name__)
        place = treating_device(target, job.config.method, reporter)
        treatment = Treatment(
            name,
            method,
            method_config,
            writer,
            folder,
            job.config.seed,
            job.config.cache_gb,
            partial(call_sensitivity, job.source.path, name, calibration.record, device=str(place), reporter=reporter),
            place,
        )
        # as the network has it; sets may be made with --dtype
        calls = calibration.of(name, dtype=torch.float32, device=place)
        model = load_float(folder, skeleton, place)
        with _plain_convolutions():
            chosen = quantize_units(treatment, model, plans, family, calls, reporter)
    modules: dict[str, ModuleRecord] = {}
    for plan in reporter.progress(plans, f"quantize {name}"):
        if plan.scheme is None:
            modules[plan.name] = ModuleRecord(reason=plan.reason)
            continue
        unit = f"{name}/{plan.name}"
        if unit not in writer.finished_units():
            seed = named_seed(job.config.seed, plan.name)
            _quantize_layer(method, method_config, plan, stored, writer, unit, target, seed)
        modules[plan.name] = ModuleRecord(**writer.unit_record(unit))
    if not calibration and (fallen := [unit for unit, record in modules.items() if record.method]):
        reporter.notice(
            f"{job.config.method} was no better than rounding to nearest, which was kept, on {first_names(fallen)}."
        )
    used = [Scheme.from_name(record.scheme) for record in modules.values() if record.scheme]
    schemes = {scheme.name: scheme for scheme in used}
    steps = _steps(calibration, used)
    attention = _attention(job.config, reporter)
    writer.write_component(
        name,
        _component_config(folder, schemes, modules, steps, attention),
        _untouched(stored, skeleton, _written(writer, name, modules)),
        info=f"quantized by {job.config.method}; schemes {', '.join(sorted(schemes))}",
    )
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    return ComponentRecord(
        class_name=type(skeleton).__name__,
        weight_hash="",
        reference_hash=job.float_hashes[name],
        parameters=parameters,
        bytes_fp32=4 * parameters,
        bytes_before=sum(file.stat().st_size for file in resolve_shards(folder).values()),
        bytes_after=0,
        quantization=QuantizationRecord(
            method=job.config.method,
            schemes=schemes,
            modules=modules,
            steps=steps,
            attention=attention,
            chosen=chosen,
        ),
    )


def _plain_convolutions() -> AbstractContextManager[None]:
    """CUDA's convolve in whole float32 then, not in the 19 bits of TF32, and give the same again."""
    cudnn = torch.backends.cudnn
    found: AbstractContextManager[None] = cudnn.flags(enabled=cudnn.enabled, deterministic=True, allow_tf32=False)  # type: ignore[no-untyped-call]
    return found


def _steps(calibration: CalibrationSet | None, schemes: list[Scheme]) -> StepRecord | None:
    """The grid that tables of activation scales belong to."""
    if calibration is None or all(scheme.act_mode != "per-step" for scheme in schemes):
        return None
    return StepRecord(schedule=calibration.schedule, rule="nearest")


def _attention(config: QuantizeConfig, reporter: Reporter) -> AttentionRecord | None:
    """How the products of attention will be rounded."""
    if config.attention_bits == 16:
        return None
    reporter.notice(
        f"attention products are rounded to {config.attention_bits} bits in simulated arithmetic: "
        "this shows the damage, it is not faster"
    )
    return AttentionRecord(bits=config.attention_bits, softmax_bits=SOFTMAX_BITS)


def check_plans(job: Job, method: ModuleType, reporter: Reporter) -> None:
    """Raise what `quantize_component` would say of the method's fields, layer names and group sizes."""
    traits = traits_of(method, build_config(method.CONFIG, **job.config.settings), job.config)
    for name in job.components:
        plan_component(job.source.path / name, job.config, reporter, traits)


def traits_of(method: ModuleType, config: Config, request: QuantizeConfig, calls: int = 1) -> Traits:
    """What the file of a method says of it.

    Raises:
        ConfigError: the method cannot do what the request combines.
    """
    if hasattr(method, "check"):
        method.check(config, request.act_bits, request.act_mode)
    return Traits(
        temporal=getattr(method, "TEMPORAL", False),
        temporal_acts=hasattr(method, "temporal_acts") and method.temporal_acts(config),
        spares=hasattr(method, "spares") and method.spares(config),
        split=getattr(method, "SPLIT", False),
        rank=method.planned_rank(config) if hasattr(method, "planned_rank") else None,
        smooth=hasattr(method, "smooths") and method.smooths(config),
        calls=calls,
    )


def plan_component(
    folder: Path, config: QuantizeConfig, reporter: Reporter, traits: Traits | None = None
) -> tuple[nn.Module, list[LayerPlan]]:
    """The network of a component on the meta device, and what will happen to each of its layers."""
    skeleton = build_skeleton(folder)
    if config.attention_bits < 16:
        attention_modules(skeleton)  # refuses what cannot be rounded
    family, known = find_family(type(skeleton).__name__)
    if not known:
        reporter.notice(f"{type(skeleton).__name__} is not a known family; roles of its layers are guessed from names")
    plans = plan_layers(skeleton, family, config, traits)
    _tell_of_plans(plans, config, reporter)
    return skeleton, plans


def _tell_of_plans(plans: list[LayerPlan], config: QuantizeConfig, reporter: Reporter) -> None:
    """What the plan could not follow, and what nothing here executes."""
    if names := without_groups(plans, config):
        reporter.notice(
            "no group of input features divides these linears; their activations have one scale per token: "
            f"{first_names(names)}."
        )
    if names := ungrouped(plans, config):
        reporter.notice(
            "no group of input features divides what these layers read, or the tensors that they read joined; their "
            f"weights have one scale per channel: {first_names(names)}."
        )
    if config.format == "nvfp4":
        reporter.notice(
            "NVFP4 weights are turned into floats at each call: no CPU multiplies them as they are, and dacc has no "
            "kernel for the GPUs that do (NVIDIA Blackwell); this saves memory, not time."
        )
    if names := integers_instead(plans, config):
        reporter.notice(
            "NVFP4 is for linears whose input features make blocks of 16; these layers have 4-bit integers: "
            f"{first_names(names)}."
        )


def _quantize_layer(
    method: ModuleType,
    config: Config,
    plan: LayerPlan,
    stored: dict[str, StoredTensor],
    writer: BundleWriter,
    unit: str,
    device: torch.device,
    seed: int,
) -> None:
    """Read one weight, quantize it, store it with its distance to the float one."""
    assert plan.scheme is not None
    weight = _read_weight(plan, stored).to(device)
    if plan.scheme.absorbs_outliers:
        treated: Treated = method.quantize_alone(weight, plan.scheme, config, seed)
    else:
        treated = Treated(method.quantize(weight, plan.scheme, config))
    error = six_digits(weight_error_of(weight, treated.weight))
    record = ModuleRecord(scheme=treated.weight.scheme.name, shape=plan.shape, error=error, method=treated.method)
    tensors = {f"{plan.name}.{key}": value.cpu() for key, value in treated.tensors().items()}
    writer.save_unit(unit, tensors, record.model_dump())


def _read_weight(plan: LayerPlan, stored: dict[str, StoredTensor]) -> Tensor:
    """The float weight of a layer, checked."""
    name = f"{plan.name}.weight"
    if name not in stored or stored[name].shape != plan.shape:
        found = f"has shape {stored[name].shape}" if name in stored else "is missing"
        raise ModelError(
            f"{name} {found}; the config needs {plan.shape}.",
            mend="Config and weights belong to different models; get both again.",
        )
    weight = stored[name].load()
    _check_finite(name, weight)
    return weight


def _check_treated(stored: dict[str, StoredTensor], plans: list[LayerPlan]) -> None:
    """Before the whole network is loaded and run."""
    for plan in plans:
        if plan.scheme:
            _read_weight(plan, stored)


def _check_kept(stored: dict[str, StoredTensor], skeleton: nn.Module, plans: list[LayerPlan]) -> None:
    """Parameters that stay float: one NaN in a bias or norm ruins every image as well. Buffers may hold infinity."""
    treated = {f"{plan.name}.weight" for plan in plans if plan.scheme}
    for name, _ in skeleton.named_parameters():
        if name in stored and name not in treated and stored[name].dtype in FLOATS:
            _check_finite(name, stored[name].load())


def _check_finite(name: str, values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ModelError(
            f"{name} holds NaN or infinity.", mend="The file is damaged or the training diverged; get another copy."
        )


def _written(writer: BundleWriter, component: str, modules: dict[str, ModuleRecord]) -> set[str]:
    """Names of the source's tensors that quantized layers take the place of: weights, and biases where a method moved
    them."""
    treated = [name for name, record in modules.items() if record.scheme]
    units = {name: writer.unit_tensors(f"{component}/{name}") for name in treated}
    return {f"{name}.weight" for name in treated} | {tensor for found in units.values() for tensor in found}


def _untouched(stored: dict[str, StoredTensor], skeleton: nn.Module, replaced: set[str]) -> dict[str, StoredTensor]:
    """The tensors that no layer replaced. Wide floats are stored in 16 bits unless the model keeps them in float32."""
    kept = set(getattr(skeleton, "_keep_in_fp32_modules", None) or ())
    return {
        name: _narrow(tensor) if tensor.dtype in WIDE and not kept & set(name.split(".")) else tensor
        for name, tensor in stored.items()
        if name not in replaced
    }


def _narrow(tensor: StoredTensor) -> StoredTensor:
    """float16, or bfloat16 where float16 would overflow."""
    values = tensor.load()
    fits = values.numel() == 0 or float(values.abs().max()) <= torch.finfo(torch.float16).max
    return tensor.to("F16" if fits else "BF16")


def _component_config(
    folder: Path,
    schemes: dict[str, Scheme],
    modules: dict[str, ModuleRecord],
    steps: StepRecord | None,
    attention: AttentionRecord | None,
) -> dict[str, Any]:
    """The model's own config.json with the `quantization_config` that the loader reads."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "dacc",
        "format": FORMAT,
        "schemes": {name: scheme.model_dump(mode="json") for name, scheme in sorted(schemes.items())},
        "modules": {name: record.scheme for name, record in sorted(modules.items()) if record.scheme},
    }
    optional = {"steps": steps, "attention": attention}
    config["quantization_config"] |= {name: part.model_dump(mode="json") for name, part in optional.items() if part}
    if names := identity_modules_of(folder):
        config["quantization_config"]["identity_modules"] = names
    return config
