"""Bundles of tiny pipelines beside the float ones that they were made from."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
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


@pytest.fixture(scope="session")
def wide_flux_folder(flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Flux with one block of each kind, 256 wide: formats with large tiles and blocks take its linears."""
    config = FluxTransformer2DModel.load_config(flux_folder, subfolder="transformer")
    config |= {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 64, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = FluxTransformer2DModel.from_config(config, axes_dims_rope=(16, 24, 24))
    folder = tmp_path_factory.mktemp("wide") / "wide-flux"
    shutil.copytree(flux_folder, folder, ignore=shutil.ignore_patterns("transformer"))
    model.save_pretrained(folder / "transformer")
    return folder


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


@pytest.fixture
def published_width(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let diffusers' conversion of Flux checkpoints, which knows the published width alone, take another one."""
    split = torch.split

    def set_width(width: int) -> None:
        def scaled(tensor: torch.Tensor, sizes: Any, dim: int = 0) -> Any:
            if isinstance(sizes, list | tuple) and sizes[0] == 3072:
                sizes = [size * width // 3072 for size in sizes]
            return split(tensor, sizes, dim)

        monkeypatch.setattr(torch, "split", scaled)

    return set_width
