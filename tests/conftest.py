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
os.environ["XDG_DATA_HOME"] = os.devnull  # a zoo that the user has installed is not for tests
os.environ.setdefault("OMP_NUM_THREADS", "1")  # so does torch: the models are too small to share between threads


@pytest.fixture(autouse=True)
def _own_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Default outputs and caches land in the test's own folder, never in the checkout or with the user."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DACC_CACHE", str(tmp_path / "cache"))


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


TEXT_LENGTH = 16  # tokens that the text pipelines take
WORDS = ["a", "small", "large", "red", "blue", "circle", "square", "above", "below", "to", "the", "left", "right", "of"]


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = {word: index for index, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=TEXT_LENGTH, **names)


def _clip() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = CLIPTextConfig(vocab_size=32, max_position_embeddings=TEXT_LENGTH, projection_dim=16, **sizes, **ids)
    return CLIPTextModel(config).eval()


def _rgb_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        shift_factor=0.0,
    ).eval()


@functools.cache
def _sd_pipeline() -> Any:
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = StableDiffusionPipeline(_rgb_vae(), _clip(), _tokenizer(), unet, scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def _flux_pipeline() -> Any:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=False,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    t5 = T5EncoderModel(T5Config(vocab_size=32, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)).eval()
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = FluxPipeline(scheduler, _rgb_vae(), _clip(), _tokenizer(), t5, _tokenizer(), transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def _video_pipeline() -> Any:
    import torch
    from diffusers import AnimateDiffPipeline, DDIMScheduler, UNetMotionModel

    torch.manual_seed(0)
    unet = UNetMotionModel(
        sample_size=16,
        layers_per_block=(1, 1),
        block_out_channels=(16, 32),
        norm_num_groups=8,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        cross_attention_dim=32,
        down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"),
        up_block_types=("CrossAttnUpBlockMotion", "UpBlockMotion"),
    ).eval()
    pipe = AnimateDiffPipeline(_rgb_vae(), _clip(), _tokenizer(), unet, None, DDIMScheduler(clip_sample=False))
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


@pytest.fixture
def sd_pipeline() -> Callable[[], Any]:
    """Makes fresh Stable Diffusion pipelines of 32 x 32 x 3 images; all hold the same weights."""
    return lambda: copy.deepcopy(_sd_pipeline())


@pytest.fixture
def flux_pipeline() -> Callable[[], Any]:
    """Makes fresh Flux pipelines without distilled guidance; they make 32 x 32 x 3 images only when asked to."""
    return lambda: copy.deepcopy(_flux_pipeline())


@pytest.fixture
def video_pipeline() -> Callable[[], Any]:
    """Makes fresh AnimateDiff pipelines; their clips are of 32 x 32 x 3 pixels. All hold the same weights."""
    return lambda: copy.deepcopy(_video_pipeline())


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
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Stable Diffusion pipeline as a folder; not to be changed."""
    folder = tmp_path_factory.mktemp("pipelines") / "tiny-sd"
    copy.deepcopy(_sd_pipeline()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Flux pipeline as a folder; not to be changed."""
    folder = tmp_path_factory.mktemp("pipelines") / "tiny-flux"
    copy.deepcopy(_flux_pipeline()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def video_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The AnimateDiff pipeline as a folder; not to be changed."""
    folder = tmp_path_factory.mktemp("pipelines") / "tiny-video"
    copy.deepcopy(_video_pipeline()).save_pretrained(folder)
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
