"""Train zoo/digits-judge: a small ResNet that reads digits, and the statistics of the real ones as it sees them.

    python zoo/train/digits_judge.py --threads 2

It gives the accuracy of class-conditional samples and the features for a Frechet distance. It is trained on 80 % of
the real digits and its accuracy is stated on the other 20 %, which are stored beside it.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from data import IMAGE_SIZE, NUM_CLASSES, Digits, Jitter, draw_batch, load_digits, split_digits
from frechet import distance_between_halves, fit_gaussian
from safetensors.torch import save_file
from torch import Tensor, nn
from trainer import TrainConfig, parse_arguments, replace_folder, train
from transformers import ResNetConfig, ResNetForImageClassification

NAME = "digits-judge"
JITTER = Jitter(degrees=12, scale=0.1, shift=1.0, probability=0.8)
HALF_SPLITS = 20


def make_judge() -> ResNetForImageClassification:
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            embedding_size=32,
            hidden_sizes=[64, 128],
            depths=[2, 2],
            layer_type="basic",
            num_labels=NUM_CLASSES,
            id2label={digit: str(digit) for digit in range(NUM_CLASSES)},
            label2id={str(digit): digit for digit in range(NUM_CLASSES)},
        )
    )


@torch.no_grad()
def look(judge: ResNetForImageClassification, images: Tensor) -> tuple[Tensor, Tensor]:
    """(features (N, 128), probabilities (N, 10)) of images in [-1, 1]."""
    features = judge.resnet(images).pooler_output
    return features.flatten(1), judge.classifier(features).softmax(dim=-1)


def accuracy_of(judge: ResNetForImageClassification, digits: Digits) -> float:
    _, probabilities = look(judge, digits.images)
    return float((probabilities.argmax(dim=-1) == digits.labels).float().mean())


def save_judge(judge: ResNetForImageClassification, folder: Path) -> None:
    """Write the model, the statistics of all real digits, and the held-out digits."""
    judge = judge.float().cpu().eval()
    digits = load_digits()
    held_out = split_digits(digits)[1]
    features, _ = look(judge, digits.images)
    gaussian = fit_gaussian(features)
    facts = {
        "count": len(digits),
        "held_out_count": len(held_out),
        "held_out_accuracy": round(accuracy_of(judge, held_out), 4),
        "fid_between_halves": round(distance_between_halves(features, splits=HALF_SPLITS, seed=0), 4),
        "halves_splits": HALF_SPLITS,
        "feature": "pooler_output",
        "feature_dim": features.shape[1],
        "input_size": [1, IMAGE_SIZE, IMAGE_SIZE],
        "value_range": [-1, 1],
        "channels": "one, grey; the stroke is +1 and the background -1",
    }

    def write(fresh: Path) -> None:
        judge.save_pretrained(fresh)
        statistics = {"mean": gaussian.mean.float(), "covariance": gaussian.covariance.float().contiguous()}
        save_file(statistics, fresh / "reference.safetensors")
        (fresh / "reference.json").write_text(json.dumps(facts, indent=2) + "\n")
        pixels = ((held_out.images + 1) * 127.5).round().to(torch.uint8)
        save_file({"images": pixels, "labels": held_out.labels}, fresh / "held_out.safetensors")

    replace_folder(folder, write)


def main() -> None:
    arguments = parse_arguments(__doc__ or "", name=NAME, steps=3000, batch_size=64)
    torch.manual_seed(arguments.seed)
    seen, _ = split_digits(load_digits())

    def loss_of(model: nn.Module, generator: torch.Generator) -> Tensor:
        batch = draw_batch(seen, arguments.batch_size, JITTER, generator)
        logits = model(batch.images.to(arguments.device)).logits
        return F.cross_entropy(logits.float(), batch.labels.to(arguments.device))

    config = TrainConfig(
        name=NAME,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=2e-3,
        weight_decay=0.05,
        checkpoint_every=500,
        seed=arguments.seed,
        device=arguments.device,
        work=arguments.work,
    )
    average = train(make_judge(), loss_of, config, lambda model: save_judge(model, arguments.work / "export" / NAME))
    save_judge(average, arguments.output)


if __name__ == "__main__":
    main()
