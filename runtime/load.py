"""The only loader: any source to a pipeline that is ready to run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging

from ..core.errors import ConfigError, ModelError, ResourceError, UnsupportedError
from ..core.manifest import Manifest
from ..core.reporter import Reporter, silent
from ..core.source import Source, component_entries, resolve_source
from ..core.verify import check_bundle
from .cached import CachePlanWarning
from .clockwork import attach_clock
from .correction import read_correction
from .diffusers_quantizer import register
from .installed import install_plan_
from .layers import set_prefer_
from .plain_load import loaded_by_us
from .plan import check_record
from .quantized_layer import Prefer
from .skeleton import build_skeleton

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    prefer: Prefer = "memory",
) -> DiffusionPipeline:
    """Load a bundle, a pipeline folder, `zoo:NAME` or a Hub id, ready to sample.

    Args:
        dtype: "auto" is float32 on a CPU and float16 on an accelerator; also float32, bfloat16, float16.
        device: "auto" takes the accelerator when there is one.
        prefer: "memory" keeps weights packed and unpacks them at each call; "speed" unpacks them once.

    Raises:
        ConfigError: a dtype, a device or a preference that there is not.
        ModelError: the source is missing or not a pipeline, or its cache plan is for another model.
        BundleError: the bundle is damaged or of a newer format, or its cache plan was edited.
    """
    return load_source(resolve_source(str(source), reporter=silent()), dtype=dtype, device=device, prefer=prefer)


def load_source(
    source: Source | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    prefer: Literal["memory", "speed"] = "memory",
    cached: bool = True,
    reporter: Reporter | None = None,
) -> DiffusionPipeline:
    """Load a resolved source; see `load`.

    Args:
        cached: install the cache plans of a bundle; without, every call computes everything.
    """
    folder = source.path if isinstance(source, Source) else source
    if prefer not in get_args(Prefer):
        raise ConfigError(f"prefer {prefer!r} is not known.", mend=f"Use {' or '.join(get_args(Prefer))}.")
    register()
    manifest = check_bundle(folder)  # before anything is mapped; plain pipelines are checked by their headers
    target = pick_device(device)
    pipe = _from_pretrained(folder, pick_dtype(dtype, target))
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            set_prefer_(component, prefer)
    pipe.set_progress_bar_config(disable=True)
    attach_clock(pipe)
    if manifest and cached:
        _install_plans_(pipe, manifest, folder)
    return pipe.to(target) if target.type != "cpu" else pipe


def _install_plans_(pipe: DiffusionPipeline, manifest: Manifest, folder: Path) -> None:
    """Hook the denoisers that have a cache plan."""
    for name, record in manifest.components.items():
        if record.cache is not None:
            check_record(record.cache, name, (record.weight_hash, record.reference_hash))
            plan = record.cache.plan
            install_plan_(pipe, name, plan, read_correction(folder / name, plan))
            if record.has_stale_correction:
                warnings.warn(
                    f"the correction of the cache plan of {name} was fitted before its weights were rounded; dacc "
                    "search-cache on this bundle fits it anew",
                    CachePlanWarning,
                    stacklevel=2,
                )


def pick_device(device: str) -> torch.device:
    """The torch device of an option value.

    Raises:
        ConfigError: not a device, or not on this machine.
    """
    if device == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        target = torch.device(device)
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {device!r} cannot be used ({str(error).splitlines()[0]}).", mend="Use --device cpu."
        ) from None
    return target


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The compute dtype of an option value.

    Raises:
        ConfigError: an unknown name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not known.", mend=f"Use one of {', '.join(DTYPES)} or auto.")
    return DTYPES[dtype]


def _from_pretrained(folder: Path, dtype: torch.dtype) -> Any:
    """diffusers' loader with its failures told in our words."""
    logging.disable_progress_bar()
    try:
        with loaded_by_us():
            return DiffusionPipeline.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError) as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in said:
            raise ResourceError(
                f"not enough memory to load {folder.name} ({said}).", mend="Use --dtype bfloat16."
            ) from None
        if broken := _broken_config(folder):
            raise broken from error
        raise ModelError(
            f"diffusers cannot load {folder.name}: {said}.",
            mend="Check the folder with diffusers' own DiffusionPipeline.from_pretrained, or copy it again.",
        ) from error
    finally:
        logging.enable_progress_bar()


def _broken_config(folder: Path) -> ModelError | None:
    """What is wrong with the config of a component. What diffusers says of it names no file, or blames the network."""
    for name, (library, _) in component_entries(folder).items():
        if library != "diffusers" or not (folder / name / "config.json").is_file():
            continue
        try:
            build_skeleton(folder / name)
        except ModelError as error:
            return error
        except UnsupportedError:
            continue
    return None
