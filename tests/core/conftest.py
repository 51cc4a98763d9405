"""Pipeline folders made of a few bytes: enough for everything that only moves, checks and hashes files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

PipelineMaker = Callable[..., Path]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test pulls the plug, so none needs to wait until its bytes are on the platter."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def write_json(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def make_pipeline(tmp_path: Path) -> PipelineMaker:
    """A function that writes a pipeline folder: one denoiser of 6 tensors, a text encoder, a scheduler, a tokenizer."""

    def make(name: str = "pipe", *, shards: int = 1) -> Path:
        folder = tmp_path / name
        entries = {
            "_class_name": "TinyPipeline",
            "unet": ["diffusers", "UNet2DModel"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "safety_checker": [None, None],
        }
        write_json(folder / "model_index.json", entries)
        write_json(folder / "unet/config.json", {"_class_name": "UNet2DModel"})
        write_json(folder / "text_encoder/config.json", {"architectures": ["CLIPTextModel"]})
        write_json(folder / "scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"})
        write_json(folder / "tokenizer/tokenizer_config.json", {})
        (folder / "tokenizer/merges.txt").write_text("a b\n")
        generator = torch.Generator().manual_seed(0)
        tensors = {f"blocks.{number}.weight": torch.randn(8, 8, generator=generator) for number in range(6)}
        write_weights(folder / "unet", tensors, shards)
        save_file({"embed": torch.ones(3, 3)}, folder / "text_encoder/model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number in range(shards):
        file_name = f"diffusion_pytorch_model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[number::shards]}
        save_file(part, folder / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file_name))
    write_json(folder / "diffusion_pytorch_model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


@pytest.fixture
def make_hub_cache(tmp_path: Path, make_pipeline: PipelineMaker) -> Callable[..., Path]:
    """A function that lays a pipeline out as the Hub client does, with links into `blobs`, and returns the cache."""

    def make(repository: str = "owner/tiny", *, commit: str = "c" * 40, without: str = "") -> Path:
        from dacc.core.safe_read import file_sha256

        plain = make_pipeline("plain-for-hub")
        cache = tmp_path / "hub"
        repo = cache / f"models--{repository.replace('/', '--')}"
        (repo / "blobs").mkdir(parents=True)
        (repo / "refs").mkdir()
        (repo / "refs/main").write_text(commit)
        for file in sorted(plain.rglob("*")):
            name = file.relative_to(plain)
            if not file.is_file() or (without and str(name).startswith(without)):
                continue
            blob = repo / "blobs" / file_sha256(file)
            blob.write_bytes(file.read_bytes())
            link = repo / "snapshots" / commit / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to("../" * (len(name.parts) + 1) + f"blobs/{blob.name}")
        return cache

    return make
