"""A zoo of tiny random pipelines with a tiny random judge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def tiny_zoo(
    tmp_path: Path,
    unet_pipeline: Callable[[], Any],
    dit_pipeline: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """Folder with zoo:tiny-unet, zoo:tiny-dit, and copies of both with slightly other weights."""
    from transformers import ResNetConfig, ResNetForImageClassification

    zoo = tmp_path / "zoo"
    for name, make in (("tiny-unet", unet_pipeline), ("tiny-dit", dit_pipeline)):
        make().save_pretrained(zoo / name)
        perturb(make()).save_pretrained(tmp_path / f"{name}-other")
    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=10
    )
    ResNetForImageClassification(config).save_pretrained(zoo / "judge")
    save_file({"mean": torch.zeros(8), "covariance": torch.eye(8)}, zoo / "judge" / "reference.safetensors")
    facts = {"count": 100, "fid_between_halves": 1.5, "input_size": [1, 16, 16], "value_range": [-1, 1]}
    (zoo / "judge" / "reference.json").write_text(json.dumps(facts))
    shared = {"description": "", "num_inference_steps": 2, "judge": "judge"}
    index = {
        "tiny-unet": {"pipeline": "DDIMPipeline", "conditioning": "none", **shared},
        "tiny-dit": {
            "pipeline": "DiTPipeline",
            "conditioning": "class",
            "classes": [0, 1, 2],
            "guidance_scale": 2.0,
            **shared,
        },
    }
    (zoo / "index.json").write_text(json.dumps(index))
    monkeypatch.setenv("DACC_ZOO", str(zoo))
    return tmp_path


HEADS = [
    {"name": "axis", "labels": ["vertical", "horizontal"]},
    *(
        {"name": f"{place} {attribute}", "labels": labels}
        for place in ("first", "second")
        for attribute, labels in (
            ("size", ["small", "large"]),
            ("colour", ["red", "blue"]),
            ("shape", ["circle", "square"]),
        )
    ),
]
CAPTION = {
    "pattern": "a {size} {colour} {shape} {relation} a {size} {colour} {shape}",
    "relations": {
        "above": ["vertical", "first"],
        "below": ["vertical", "second"],
        "to the left of": ["horizontal", "first"],
        "to the right of": ["horizontal", "second"],
    },
}
CALIBRATION = ["a small red circle above a large blue square", "a large red square below a small red circle"]
EVALUATION = ["a small blue circle to the left of a large red square", "a large red circle above a small blue square"]


@pytest.fixture
def text_zoo(tmp_path: Path, sd_folder: Path, flux_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Zoo folder with zoo:tiny-sd, zoo:tiny-flux and a tiny random judge of two coloured shapes."""
    from transformers import ResNetConfig, ResNetForImageClassification

    zoo = tmp_path / "text-zoo"
    for source in (sd_folder, flux_folder):
        shutil.copytree(source, zoo / source.name)
        prompts = {"calibration": CALIBRATION, "evaluation": EVALUATION}
        (zoo / source.name / "prompts.json").write_text(json.dumps(prompts))
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=14)
    ResNetForImageClassification(config).save_pretrained(zoo / "shapes")
    save_file({"mean": torch.zeros(8), "covariance": torch.eye(8)}, zoo / "shapes" / "reference.safetensors")
    facts = {"input_size": [3, 32, 32], "value_range": [-1, 1], "heads": HEADS, "caption": CAPTION}
    (zoo / "shapes" / "reference.json").write_text(json.dumps(facts))
    shared = {"description": "", "num_inference_steps": 2, "conditioning": "text", "judge": "shapes"}
    index = {
        "tiny-sd": {"pipeline": "StableDiffusionPipeline", "guidance_scale": 3.0, **shared},
        "tiny-flux": {"pipeline": "FluxPipeline", "guidance_scale": 2.0, "height": 32, "width": 32, **shared},
    }
    (zoo / "index.json").write_text(json.dumps(index))
    monkeypatch.setenv("DACC_ZOO", str(zoo))
    return zoo


def perturb(pipe: Any) -> Any:
    """The same pipeline with a little noise on the denoiser's weights."""
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in denoiser.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.02)
    return pipe
