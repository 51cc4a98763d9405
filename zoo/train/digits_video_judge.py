"""Train zoo/digits-video-judge: a small ResNet that reads pairs of frames, and the statistics of real clips.

    python zoo/train/digits_video_judge.py --threads 2

It sees a frame and the next one (the last frame: twice itself) and says which digit the first shows and where the digit
moves. The features of a clip are the mean and the standard deviation over time of the pairs' features: what is shown
and how it moves, and whether that stays so. The same 80 % of the real digits are seen in training as by digits-judge.

Letters: N clips, F frames, D = 64 features of a pair.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from clips import DIGIT_NAMES, DIRECTIONS, FORMS, FRAME_SIZE, FRAMES, draw_clips
from data import Digits, load_digits, split_digits
from frechet import distance_between_halves, fit_gaussian
from safetensors.torch import save_file
from torch import Tensor, nn
from trainer import TrainConfig, parse_arguments, replace_folder, shared_fields, train
from transformers import ResNetConfig, ResNetForImageClassification

NAME = "digits-video-judge"
STILL = len(DIRECTIONS)  # the answer for a pair of one frame
ANSWERS = {"digit": DIGIT_NAMES, "direction": (*DIRECTIONS, "still")}
NOISE = 0.1  # most noise on a pair in training, so that small flaws do not blind the judge
HELD_OUT_CLIPS, REFERENCE_CLIPS = 2000, 2000
HELD_OUT_SEED, REFERENCE_SEED = 1, 2
HALF_SPLITS = 20


@dataclass(frozen=True)
class Looked:
    features: Tensor  # (N, 2D)
    digits: Tensor  # (N, F) int64
    directions: Tensor  # (N,) int64, into the answers of "direction"


def make_judge() -> ResNetForImageClassification:
    labels = [f"{head} {answer}" for head, answers in ANSWERS.items() for answer in answers]
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=2,
            embedding_size=32,
            hidden_sizes=[64, 64],
            depths=[2, 2],
            layer_type="basic",
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: number for number, label in enumerate(labels)},
        )
    )


def pairs_of(frames: Tensor) -> Tensor:
    """Frames (N, F, 1, S, S) beside their successors; the last beside itself: (N, F, 2, S, S)."""
    return torch.cat([frames, torch.cat([frames[:, 1:], frames[:, -1:]], dim=1)], dim=2)


@torch.no_grad()
def look(judge: ResNetForImageClassification, frames: Tensor) -> Looked:
    """What it says of clips (N, F, 1, S, S) in [-1, 1]. The direction is the likeliest by all pairs of two frames."""
    pairs = pairs_of(frames)
    pooled = torch.cat([judge.resnet(part).pooler_output.flatten(1) for part in pairs.flatten(0, 1).split(256)])
    digit, direction = (
        judge.classifier(pooled).unflatten(0, pairs.shape[:2]).split(list(map(len, ANSWERS.values())), -1)
    )
    moving = pooled.unflatten(0, pairs.shape[:2])[:, :-1]  # (N, F - 1, D)
    features = torch.cat([moving.mean(dim=1), moving.std(dim=1, correction=0)], dim=-1)
    likely = direction[:, :-1].log_softmax(dim=-1).sum(dim=1)
    return Looked(features, digit.argmax(dim=-1), likely.argmax(dim=-1))


def accuracy_of(judge: ResNetForImageClassification, digits: Digits) -> dict[str, float]:
    """Shares of frames and of clips that are read rightly, on clips of these digits."""
    clips = draw_clips(digits, HELD_OUT_CLIPS, torch.Generator().manual_seed(HELD_OUT_SEED))
    seen = look(judge, clips.frames)
    right = {"digit": seen.digits == clips.digits[:, None], "motion": seen.directions == clips.directions}
    return {name: round(float(found.float().mean()), 4) for name, found in right.items()}


def save_judge(judge: nn.Module, folder: Path) -> None:
    """Write the model, and the statistics of clips of all real digits."""
    judge = judge.float().cpu().eval()
    digits = load_digits()
    features = look(
        judge, draw_clips(digits, REFERENCE_CLIPS, torch.Generator().manual_seed(REFERENCE_SEED)).frames
    ).features
    gaussian = fit_gaussian(features)
    facts: dict[str, Any] = {
        "count": len(features),
        "held_out_count": HELD_OUT_CLIPS,
        "held_out_accuracy": accuracy_of(judge, split_digits(digits)[1]),
        "fid_between_halves": round(distance_between_halves(features, splits=HALF_SPLITS, seed=0), 4),
        "halves_splits": HALF_SPLITS,
        "feature": "mean and standard deviation over time of the pooler_output of pairs of frames",
        "feature_dim": features.shape[1],
        "input_size": [FRAMES, 1, FRAME_SIZE, FRAME_SIZE],
        "value_range": [-1, 1],
        "channels": "one, grey; the stroke is +1 and the background -1; the model reads two frames as two channels",
        "heads": [{"name": name, "labels": list(answers)} for name, answers in ANSWERS.items()],
        "captions": list(FORMS),
    }

    def write(fresh: Path) -> None:
        judge.save_pretrained(fresh)
        statistics = {"mean": gaussian.mean.float(), "covariance": gaussian.covariance.float().contiguous()}
        save_file(statistics, fresh / "reference.safetensors")
        (fresh / "reference.json").write_text(json.dumps(facts, indent=2) + "\n")

    replace_folder(folder, write)


def draw_pairs(digits: Digits, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs (N, 2, S, S) from random clips with their digits and directions; some show one frame twice, and in some the
    second frame shows another digit, which must not be read for the first."""
    clips = draw_clips(digits, count, generator)
    every = torch.arange(count)
    pairs = pairs_of(clips.frames)[every, torch.randint(FRAMES - 1, (count,), generator=generator)]
    part = torch.rand(count, generator=generator)
    still = part < 1 / 8
    pairs[still, 1] = pairs[still, 0]
    other = pairs.roll(1, 0)[:, 1]
    pairs = torch.where((part > 7 / 8)[:, None, None, None], torch.stack([pairs[:, 0], other], dim=1), pairs)
    directions = torch.where(still, STILL, clips.directions)
    return pairs, clips.digits, torch.where(part > 7 / 8, -100, directions)  # -100: no question of direction


def main() -> None:
    arguments = parse_arguments(__doc__ or "", name=NAME, steps=800, batch_size=64)
    torch.manual_seed(arguments.seed)
    seen, _ = split_digits(load_digits())

    def loss_of(model: nn.Module, generator: torch.Generator) -> Tensor:
        pairs, digits, directions = draw_pairs(seen, arguments.batch_size, generator)
        strength = NOISE * torch.rand(len(pairs), 1, 1, 1, generator=generator)
        noisy = pairs + strength * torch.randn(pairs.shape, generator=generator)
        digit, direction = model(noisy.to(arguments.device)).logits.split(list(map(len, ANSWERS.values())), -1)
        return F.cross_entropy(digit, digits.to(digit.device)) + F.cross_entropy(direction, directions.to(digit.device))

    config = TrainConfig(
        name=NAME,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=2e-3,
        weight_decay=0.05,
        **shared_fields(arguments),
    )
    average = train(make_judge(), loss_of, config, lambda model: None)
    save_judge(average, arguments.output)


if __name__ == "__main__":
    main()
