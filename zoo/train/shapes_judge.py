"""Train zoo/shapes-judge: a small ResNet that reads a drawing, and the statistics of drawings as it sees them.

    python zoo/train/shapes_judge.py --threads 2

One classifier with seven heads, one after the other in its logits: the axis, then size, colour and shape of the object
in the first place (upper or left) and of the one in the second. It is trained on drawings of the seen scenes; its
accuracy is stated on drawings of the held-out ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from frechet import distance_between_halves, fit_gaussian, frechet_distance
from safetensors.torch import save_file
from shapes import (
    HEADS,
    IMAGE_SIZE,
    PATTERN,
    RELATIONS,
    all_scenes,
    answers_loss,
    draw,
    read_answers,
    score,
    split_scenes,
)
from torch import Tensor, nn
from trainer import TrainConfig, parse_arguments, replace_folder, shared_fields, train
from transformers import ResNetConfig, ResNetForImageClassification

NAME = "shapes-judge"
NOISE = 0.1  # at most; a judge that only ever saw clean drawings is thrown off by what an autoencoder leaves
HALF_SPLITS = 20
HELD_OUT_COPIES = 10  # drawings of every held-out scene
REFERENCE_SEED, HELD_OUT_SEED = 1, 2  # streams of their own: no drawing of the training comes back


def make_judge() -> ResNetForImageClassification:
    answers = [f"{head}: {answer}" for head, choices in HEADS.items() for answer in choices]
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=3,
            embedding_size=32,
            hidden_sizes=[64, 128],
            depths=[2, 2],
            layer_type="basic",
            num_labels=len(answers),
            id2label=dict(enumerate(answers)),
            label2id={answer: number for number, answer in enumerate(answers)},
        )
    )


@torch.no_grad()
def look(judge: ResNetForImageClassification, images: Tensor) -> tuple[Tensor, Tensor]:
    """(features (N, 128), answers (N, 7)) of images in [-1, 1]."""
    seen = [judge.resnet(batch).pooler_output for batch in images.split(256)]
    features = torch.cat(seen)
    return features.flatten(1), read_answers(judge.classifier(features))


def held_out_accuracy(judge: ResNetForImageClassification) -> dict[str, float]:
    """Share of drawings of held-out scenes that are read rightly: each kind of answer, and all of them."""
    scenes = split_scenes().held_out.repeat(HELD_OUT_COPIES, 1)
    _, answers = look(judge, draw(scenes, torch.Generator().manual_seed(HELD_OUT_SEED)))
    return {name: round(float(right.float().mean()), 4) for name, right in score(answers, scenes).items()}


def _held_out_features(judge: ResNetForImageClassification) -> Tensor:
    scenes = split_scenes().held_out.repeat(HELD_OUT_COPIES, 1)
    return look(judge, draw(scenes, torch.Generator().manual_seed(HELD_OUT_SEED)))[0]


def make_facts(judge: ResNetForImageClassification, features: Tensor) -> dict[str, Any]:
    """What a reader of judgements needs. Samples are of the held-out scenes, the reference is of all: even perfect
    drawings are `fid_of_held_out_drawings` away from it."""
    real = fit_gaussian(features)
    return {
        "count": len(features),
        "held_out_count": HELD_OUT_COPIES * len(split_scenes().held_out),
        "held_out_accuracy": held_out_accuracy(judge),
        "fid_between_halves": round(distance_between_halves(features, splits=HALF_SPLITS, seed=0), 4),
        "halves_splits": HALF_SPLITS,
        "fid_of_held_out_drawings": round(frechet_distance(fit_gaussian(_held_out_features(judge)), real), 4),
        "feature": "pooler_output",
        "feature_dim": features.shape[1],
        "input_size": [3, IMAGE_SIZE, IMAGE_SIZE],
        "value_range": [-1, 1],
        "channels": "RGB; the background is white",
        "heads": [{"name": name, "labels": list(answers)} for name, answers in HEADS.items()],
        "caption": {"pattern": PATTERN, "relations": {word: list(meaning) for word, meaning in RELATIONS.items()}},
    }


def save_judge(judge: nn.Module, folder: Path) -> None:
    """Write the model, and the statistics of one drawing of every scene."""
    judge = judge.float().cpu().eval()
    features, _ = look(judge, draw(all_scenes(), torch.Generator().manual_seed(REFERENCE_SEED)))
    gaussian = fit_gaussian(features)
    facts = make_facts(judge, features)

    def write(fresh: Path) -> None:
        judge.save_pretrained(fresh)
        statistics = {"mean": gaussian.mean.float(), "covariance": gaussian.covariance.float().contiguous()}
        save_file(statistics, fresh / "reference.safetensors")
        (fresh / "reference.json").write_text(json.dumps(facts, indent=2) + "\n")

    replace_folder(folder, write)


def main() -> None:
    arguments = parse_arguments(__doc__ or "", name=NAME, steps=1500, batch_size=64)
    torch.manual_seed(arguments.seed)
    seen = split_scenes().seen

    def loss_of(model: nn.Module, generator: torch.Generator) -> Tensor:
        scenes = seen[torch.randint(len(seen), (arguments.batch_size,), generator=generator)]
        images = draw(scenes, generator)
        strength = NOISE * torch.rand(len(images), 1, 1, 1, generator=generator)
        noisy = images + strength * torch.randn(images.shape, generator=generator)
        return answers_loss(model(noisy.to(arguments.device)).logits, scenes)

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
