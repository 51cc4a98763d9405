"""Measure a finished zoo pipeline with zoo/digits-judge, and write its card and sample grid.

    python zoo/train/judge.py digits-dit --samples 1000 --threads 2

Sampling uses the pipeline as saved, with the defaults of zoo/index.json. No scikit-learn is needed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from card import write_card
from diffusers import DiffusionPipeline
from frechet import Gaussian, fit_gaussian, frechet_distance
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import ResNetForImageClassification

ZOO = Path(__file__).resolve().parents[1]
BATCH_SIZE = 50


def load_judge(folder: Path) -> tuple[ResNetForImageClassification, Gaussian, dict[str, Any]]:
    """The judge, the Gaussian of the real digits' features, and the facts about both."""
    statistics = load_file(folder / "reference.safetensors")
    real = Gaussian(statistics["mean"].double(), statistics["covariance"].double())
    facts = json.loads((folder / "reference.json").read_text())
    return ResNetForImageClassification.from_pretrained(folder).eval(), real, facts


def draw_samples(pipeline: DiffusionPipeline, entry: dict[str, Any], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(images (N, 1, S, S) in [-1, 1], labels (N,), all -1 where the pipeline takes none)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10 if entry["conditioning"] == "class" else torch.full((count,), -1)
    images = []
    for chunk in labels.split(BATCH_SIZE):
        asked: dict[str, Any] = {"batch_size": len(chunk)}
        if entry["conditioning"] == "class":
            asked = {"class_labels": chunk.tolist(), "guidance_scale": entry["guidance_scale"]}
        steps = entry["num_inference_steps"]
        output = pipeline(**asked, num_inference_steps=steps, generator=generator, output_type="np")
        images.append(torch.from_numpy(output.images).permute(0, 3, 1, 2) * 2 - 1)
    return torch.cat(images), labels


def denoiser_of(pipeline: DiffusionPipeline) -> nn.Module:
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


@torch.no_grad()
def count_macs(pipeline: DiffusionPipeline, entry: dict[str, Any]) -> int:
    """Multiply-accumulates of one denoiser call on one image."""
    denoiser = denoiser_of(pipeline)
    size, channels = denoiser.config.sample_size, denoiser.config.in_channels
    labels = {"class_labels": torch.tensor([0])} if entry["conditioning"] == "class" else {}
    with FlopCounterMode(display=False) as counter:
        denoiser(torch.zeros(1, channels, size, size), timestep=torch.tensor([500]), **labels)
    return counter.get_total_flops() // 2


@torch.no_grad()
def measure(pipeline: DiffusionPipeline, entry: dict[str, Any], images: Tensor, labels: Tensor) -> dict[str, Any]:
    judge, real, facts = load_judge(ZOO / entry["judge"])
    features = judge.resnet(images).pooler_output
    confidence, digit = judge.classifier(features).softmax(dim=-1).max(dim=-1)
    measured: dict[str, Any] = {
        "samples": len(images),
        "parameters": sum(parameter.numel() for parameter in denoiser_of(pipeline).parameters()),
        "macs_per_call": count_macs(pipeline, entry),
        "fid": round(frechet_distance(fit_gaussian(features.flatten(1)), real), 3),
        "fid_between_halves": round(facts["fid_between_halves"], 3),
        "mean_confidence": round(float(confidence.mean()), 4),
        "share_above_0.9": round(float((confidence > 0.9).float().mean()), 4),
        "drawn_per_class": digit.bincount(minlength=10).tolist(),
    }
    if entry["conditioning"] == "class":
        right = digit == labels
        measured["accuracy"] = round(float(right.float().mean()), 4)
        measured["accuracy_per_class"] = [round(float(right[labels == k].float().mean()), 3) for k in range(10)]
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="a pipeline of zoo/index.json")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--guidance-scale", type=float, help="try another than the default")
    parser.add_argument("--folder", type=Path, help="the pipeline, if not zoo/<name>; no card is written then")
    parser.add_argument("--grid", type=Path, help="also write the sample grid here")
    parser.add_argument("--work", type=Path, default=ZOO.parent / ".work" / "zoo", help="where it was trained")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    entry = json.loads((ZOO / "index.json").read_text())[arguments.name]
    if arguments.guidance_scale is not None:
        entry["guidance_scale"] = arguments.guidance_scale

    pipeline = DiffusionPipeline.from_pretrained(arguments.folder or ZOO / arguments.name)
    pipeline.set_progress_bar_config(disable=True)
    images, labels = draw_samples(pipeline, entry, arguments.samples, arguments.seed)
    measured = measure(pipeline, entry, images, labels)
    print(json.dumps(measured, indent=2))
    if arguments.folder is None and arguments.guidance_scale is None:
        training = json.loads((arguments.work / arguments.name / "training.json").read_text())
        write_card(ZOO / arguments.name, arguments.name, entry, {**measured, "training": training}, images)
    if arguments.grid is not None:
        from card import write_grid

        write_grid(images, arguments.grid)


if __name__ == "__main__":
    main()
