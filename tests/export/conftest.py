"""Bundles of tiny pipelines beside the float ones that they were made from."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dacc.quant.api import quantize_pipeline
from dacc.quant.config import QuantizeConfig


@pytest.fixture
def bundle(tmp_path: Path) -> Callable[..., Path]:
    """Quantize a copy of a folder in the test's own folder: `bundle(flux_folder, bits=4)`."""

    def make(folder: Path, calibrated: Mapping[str, Any] = MappingProxyType({}), **options: Any) -> Path:
        source = tmp_path / folder.name
        if not source.exists():
            shutil.copytree(folder, source)
        config = QuantizeConfig(measure="never", **options)
        return quantize_pipeline(source, config, output=tmp_path / "bundle", device="cpu", **calibrated)

    return make


@pytest.fixture
def weights_of() -> Callable[..., dict[str, torch.Tensor]]:
    """The tensors of an unsharded component: `weights_of(folder, "unet")`."""
    return lambda folder, component="transformer": load_file(folder / component / "diffusion_pytorch_model.safetensors")


@pytest.fixture
def flux_inputs() -> Callable[[torch.dtype], dict[str, torch.Tensor]]:
    """Arguments of the tiny Flux transformer, the same at every call."""

    def make(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        return {
            "hidden_states": torch.randn(1, 4, 16, generator=generator).to(dtype),
            "encoder_hidden_states": torch.randn(1, 3, 32, generator=generator).to(dtype),
            "pooled_projections": torch.randn(1, 32, generator=generator).to(dtype),
            "timestep": torch.tensor([0.5], dtype=dtype),
            "img_ids": torch.zeros(4, 3),
            "txt_ids": torch.zeros(3, 3),
        }

    return make
