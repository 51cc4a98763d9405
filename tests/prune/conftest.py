"""Pipelines with blocks to spare, and what enters them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dacc import CalibrateConfig, PruneConfig, calibrate_pipeline, prune_pipeline
from dacc.runtime.clock import RunState
from dacc.runtime.trajectory import DenoiserCall

from . import toys

QUICK: dict[str, Any] = {"measure": "never", "settings": {"samples": 1, "timesteps": 2}}


def liven(network: nn.Module) -> nn.Module:
    """Blocks of a fresh network hardly do anything; these do, each another amount."""
    torch.manual_seed(3)
    for name, parameter in network.named_parameters():
        if "block" in name or "layers" in name:
            parameter.data.normal_(std=0.05)
    return network


@pytest.fixture(scope="session")
def deep_dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional pipeline whose transformer has six blocks; not to be changed."""
    from diffusers import DDIMScheduler, DiTPipeline

    from ..conftest import _dit_pipeline

    network = liven(toys.dit(num_layers=6, num_embeds_ada_norm=1000, out_channels=4).build())
    pipe = DiTPipeline(network, copy.deepcopy(_dit_pipeline().vae), DDIMScheduler(clip_sample=False))
    folder = tmp_path_factory.mktemp("pipelines") / "deep-dit"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def deep_unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unconditional pipeline of a U-Net with two layers in each stage; not to be changed."""
    from diffusers import DDIMPipeline, DDIMScheduler

    pipe = DDIMPipeline(toys.unet2d().build(), DDIMScheduler(clip_sample=False))
    folder = tmp_path_factory.mktemp("pipelines") / "deep-unet"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def inputs_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Makes a small calibration set of a pipeline, once."""
    root, made = tmp_path_factory.mktemp("inputs"), dict[Path, Path]()

    def make(source: Path) -> Path:
        if source not in made:
            config = CalibrateConfig(samples=2, steps=4, timesteps=2, batch_size=2)
            made[source] = calibrate_pipeline(source, config, output=root / source.name, device="cpu")
        return made[source]

    return make


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory, inputs_of: Callable[[Path], Path]) -> Callable[..., Path]:
    """Makes a pruned bundle of a pipeline, each once; not to be changed."""
    root, made = tmp_path_factory.mktemp("pruned"), dict[Any, Path]()

    def make(source: Path, **fields: Any) -> Path:
        config = PruneConfig(**{"measure": "never", **fields})
        key = (source, config.model_dump_json())
        if key not in made:
            output = root / f"{source.name}-{len(made)}"
            made[key] = prune_pipeline(source, config, calib=inputs_of(source), output=output, device="cpu")
        return made[key]

    return make


@pytest.fixture
def calls_of() -> Callable[[toys.Toy], list[DenoiserCall]]:
    """What enters a toy at three noise levels of one run."""

    def make(toy: toys.Toy) -> list[DenoiserCall]:
        found = []
        for call, sigma in enumerate((5.0, 1.0, 0.2)):
            torch.manual_seed(call)
            state = RunState(-1, call, 3, call, 3, 900.0 - 400 * call, sigma)
            found.append(DenoiserCall("transformer", state, (), toy.inputs()))
        return found

    return make
