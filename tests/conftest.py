"""Tiny random pipelines. Built once, handed out as fresh copies or as folders that a test may read but not change."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dacc

# pytest takes the repository root for a package of the folder's name and would import a second dacc under that name
sys.modules.setdefault(Path(__file__).parents[1].name, dacc)
os.environ["HF_HUB_OFFLINE"] = "1"  # the Hub client reads it once, at its import
os.environ.setdefault("OMP_NUM_THREADS", "1")  # so does torch: the models are too small to share between threads


@pytest.fixture(autouse=True)
def _own_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Default outputs land in the test's own folder, never in the checkout."""
    monkeypatch.chdir(tmp_path)


@functools.cache
def _unet_pipeline() -> Any:
    import torch
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    pipe = DDIMPipeline(unet, DDIMScheduler(num_train_timesteps=1000, clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def _dit_pipeline() -> Any:
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        norm_num_groups=4,
        num_embeds_ada_norm=1000,
    ).eval()
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).eval()
    pipe = DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def unet_pipeline() -> Callable[[], Any]:
    """Makes fresh unconditional DDIM pipelines of 16 x 16 x 1 images; all hold the same weights."""
    return lambda: copy.deepcopy(_unet_pipeline())


@pytest.fixture
def dit_pipeline() -> Callable[[], Any]:
    """Makes fresh class-conditional DiT pipelines with a VAE (16 x 16 x 1); all hold the same weights."""
    return lambda: copy.deepcopy(_dit_pipeline())


@pytest.fixture(scope="session")
def unet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unconditional pipeline as a folder; not to be changed."""
    folder = tmp_path_factory.mktemp("pipelines") / "tiny-unet"
    copy.deepcopy(_unet_pipeline()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The class-conditional pipeline as a folder; not to be changed."""
    folder = tmp_path_factory.mktemp("pipelines") / "tiny-dit"
    copy.deepcopy(_dit_pipeline()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sana_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer with grouped convolutions and of no known family; a denoiser and a scheduler only."""
    import torch
    from diffusers import DDIMScheduler, SanaTransformer2DModel

    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=24,
        mlp_ratio=2.0,
        sample_size=8,
    )
    folder = tmp_path_factory.mktemp("pipelines") / "tiny-sana"
    transformer.save_pretrained(folder / "transformer")
    DDIMScheduler().save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(
        '{"_class_name": "SanaPipeline", "transformer": ["diffusers", "SanaTransformer2DModel"],'
        ' "scheduler": ["diffusers", "DDIMScheduler"]}'
    )
    return folder


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a bundle of a folder, `bundle_of(folder, bits=4)`; each config once, not to be changed."""
    root, made = tmp_path_factory.mktemp("bundles"), {}

    def make(source: Path, **fields: Any) -> Path:
        from dacc import QuantizeConfig, quantize_pipeline

        config = QuantizeConfig(**{"measure": "never", **fields})
        key = (source, config.model_dump_json())
        if key not in made:
            made[key] = quantize_pipeline(source, config, output=root / f"{source.name}-{len(made)}", device="cpu")
        return made[key]

    return make


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program in a fresh interpreter: `run_python(code, *arguments)`; its output is text."""

    def run(code: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONSAFEPATH": "1"}
        command = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 or not check, done.stderr
        return done

    return run
