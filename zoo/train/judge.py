"""Measure a finished zoo pipeline with its judge, and write its card and sample grid or strips.

    python zoo/train/judge.py digits-dit --samples 1000 --threads 2

Sampling uses the pipeline as saved, with the defaults of zoo/index.json. Text-to-image pipelines are asked for their
evaluation prompts, in turn. No scikit-learn is needed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from card import write_card, write_grid
from diffusers import DiffusionPipeline
from frechet import Gaussian, fit_gaussian, frechet_distance
from safetensors.torch import load_file
from sampling import Asked, count_macs, denoiser_of, draw_samples
from shapes import read_answers, scene_of, score
from torch import Tensor
from transformers import ResNetForImageClassification
from video_card import measure_clips, write_strips, write_video_card

ZOO = Path(__file__).resolve().parents[1]
STAGES = {  # what was trained before the denoiser
    "digits-dit": ("digits-dit-vae",),
    "digits-video": ("digits-video-vae", "digits-video-clip", "digits-video-frames", "digits-video-clips"),
    "shapes-sd": ("shapes-vae", "shapes-clip"),
    "shapes-mmdit": ("shapes-vae", "shapes-clip", "shapes-t5"),
}


@dataclass(frozen=True)
class Judge:
    model: ResNetForImageClassification
    real: Gaussian  # of the features of real images
    facts: dict[str, Any]

    @torch.no_grad()
    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(features (N, D), logits (N, K)) of images in [-1, 1]."""
        features = torch.cat([self.model.resnet(batch).pooler_output for batch in images.split(256)])
        return features.flatten(1), self.model.classifier(features)


def load_judge(folder: Path) -> Judge:
    statistics = load_file(folder / "reference.safetensors")
    real = Gaussian(statistics["mean"].double(), statistics["covariance"].double())
    facts = json.loads((folder / "reference.json").read_text())
    return Judge(ResNetForImageClassification.from_pretrained(folder).eval(), real, facts)


def what_to_ask(folder: Path, entry: dict[str, Any], count: int) -> Asked:
    """Every digit, or every evaluation prompt, equally often."""
    if entry["conditioning"] == "class":
        return [number % 10 for number in range(count)]
    if entry["conditioning"] == "text":
        prompts = json.loads((folder / "prompts.json").read_text())["evaluation"]
        return [prompts[number % len(prompts)] for number in range(count)]
    return None


def measure(judge: Judge, images: Tensor, asked: Asked) -> dict[str, Any]:
    """What the judge says of the samples; `asked` says what each should show."""
    if images.ndim == 5:
        assert asked is not None
        return measure_clips(judge.model, judge.real, judge.facts, images, [str(caption) for caption in asked])
    features, logits = judge.look(images)
    measured: dict[str, Any] = {
        "samples": len(images),
        "fid": round(frechet_distance(fit_gaussian(features), judge.real), 3),
        "fid_between_halves": round(judge.facts["fid_between_halves"], 3),
    }
    if asked is not None and isinstance(asked[0], str):
        measured["fid_of_held_out_drawings"] = round(judge.facts["fid_of_held_out_drawings"], 3)
        scenes = torch.stack([scene_of(caption) for caption in asked])
        right = score(read_answers(logits), scenes)
        return measured | {name: round(float(share.float().mean()), 4) for name, share in right.items()}
    return measured | measure_digits(logits, asked)


def measure_digits(logits: Tensor, asked: Asked) -> dict[str, Any]:
    confidence, digit = logits.softmax(dim=-1).max(dim=-1)
    measured: dict[str, Any] = {
        "mean_confidence": round(float(confidence.mean()), 4),
        "share_above_0.9": round(float((confidence > 0.9).float().mean()), 4),
        "drawn_per_class": digit.bincount(minlength=10).tolist(),
    }
    if asked is not None:
        labels = torch.tensor(asked)
        right = digit == labels
        measured["accuracy"] = round(float(right.float().mean()), 4)
        measured["accuracy_per_class"] = [round(float(right[labels == k].float().mean()), 3) for k in range(10)]
    return measured


def training_facts(name: str, work: Path) -> dict[str, Any]:
    """What the trainer noted of the denoiser, and the processor time of the stages before it."""
    facts = [json.loads((work / stage / "training.json").read_text()) for stage in (name, *STAGES.get(name, ()))]
    return {**facts[0], "cpu_seconds_before": sum(stage["cpu_seconds"] for stage in facts[1:])}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a pipeline of zoo/index.json")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--guidance-scale", type=float, help="try another than the default; no card is written then")
    parser.add_argument("--steps", type=int, help="the same for the number of steps")
    parser.add_argument("--folder", type=Path, help="the pipeline, if not zoo/<name>; no card is written then")
    parser.add_argument("--grid", type=Path, help="also write the sample grid here")
    parser.add_argument("--work", type=Path, default=ZOO.parent / ".work" / "zoo", help="where it was trained")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    entry = json.loads((ZOO / "index.json").read_text())[arguments.name]
    tried = {"guidance_scale": arguments.guidance_scale, "num_inference_steps": arguments.steps}
    changed = {field: value for field, value in tried.items() if value is not None}
    entry |= changed

    folder = arguments.folder or ZOO / arguments.name
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    asked = what_to_ask(folder, entry, arguments.samples)
    images = draw_samples(pipeline, entry, asked, arguments.samples, arguments.seed)
    measured = {
        "parameters": sum(parameter.numel() for parameter in denoiser_of(pipeline).parameters()),
        "macs_per_call": count_macs(pipeline, entry, asked),
        **measure(load_judge(ZOO / entry["judge"]), images, asked),
    }
    print(json.dumps(measured, indent=2))
    if arguments.folder is None and not changed:
        training = training_facts(arguments.name, arguments.work)
        write = write_video_card if images.ndim == 5 else write_card
        write(ZOO / arguments.name, arguments.name, entry, {**measured, "training": training}, images, asked)
    if arguments.grid is not None:
        (write_strips if images.ndim == 5 else write_grid)(images, arguments.grid)


if __name__ == "__main__":
    main()
