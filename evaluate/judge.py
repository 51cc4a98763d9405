"""The judge of a zoo pipeline: a small classifier, and the statistics of its features on real images.

It answers one question (which digit?) or several, each by a head: a stretch of its logits, one for each label.
Letters: N images, D feature width, Q questions (heads).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from ..core.errors import ModelError
from ..core.safe_read import read_json
from ..core.zoo import ZooEntry
from .caption import CaptionReader, Grammar, Head, Scene

BATCH = 256


@dataclass(frozen=True)
class Judged:
    """What the judge says of images."""

    features: Tensor  # (N, D) float32
    answers: Tensor  # (N, Q) int64, the likeliest label of every head


@dataclass(frozen=True)
class Judge:
    """A classifier with reference statistics."""

    name: str
    model: Any  # a transformers image classifier
    facts: dict[str, Any]  # reference.json
    mean: Tensor  # (D,) float64
    covariance: Tensor  # (D, D) float64
    heads: tuple[Head, ...] = ()  # none: all logits are one head
    reader: CaptionReader | None = None  # of the captions that it can check

    def fits(self, images: Tensor) -> bool:
        """Whether images (N, C, H, W) have the size that the judge was trained on."""
        return list(images.shape[1:]) == self.facts["input_size"]

    @torch.inference_mode()
    def look(self, images: Tensor) -> Judged:
        """Judge images (N, C, H, W) in [0, 1].

        Raises:
            ModelError: they do not have the size that the judge was trained on.
        """
        if not self.fits(images):
            raise ModelError(
                f"images of shape {tuple(images.shape[1:])} do not fit the judge {self.name}, "
                f"which knows {tuple(self.facts['input_size'])}.",
                mend="Evaluate without the metrics that need a judge.",
            )
        low, high = self.facts["value_range"]
        features, answers = [], []
        for batch in (images * (high - low) + low).split(BATCH):
            pooled = self.model.base_model(batch).pooler_output
            features.append(pooled.flatten(1))
            logits = self.model.classifier(pooled)
            widths = [len(head.labels) for head in self.heads] or [logits.shape[-1]]
            answers.append(torch.stack([head.argmax(dim=-1) for head in logits.split(widths, dim=-1)], dim=-1))
        return Judged(torch.cat(features), torch.cat(answers))

    def scenes(self, judged: Judged) -> list[Scene]:
        """What it saw in every image, in words."""
        return [
            {head.name: head.labels[answer] for head, answer in zip(self.heads, row, strict=True)}
            for row in judged.answers.tolist()
        ]


def load_judge(entry: ZooEntry) -> Judge | None:
    """The judge beside a zoo pipeline; None when its entry names none.

    Raises:
        ModelError: it is named but not there, or its facts do not describe it.
    """
    if entry.judge is None:
        return None
    from transformers import AutoModelForImageClassification

    folder = entry.path.parent / entry.judge
    if not (folder / "reference.safetensors").is_file():
        raise ModelError(f"the judge {folder} is missing.", mend=_AGAIN)
    statistics = load_file(folder / "reference.safetensors")
    facts = read_json(folder / "reference.json")
    model = _quiet(AutoModelForImageClassification.from_pretrained, folder).eval()
    heads, reader = _questions(folder, facts, model.config.num_labels)
    return Judge(
        name=entry.judge,
        model=model,
        facts=facts,
        mean=statistics["mean"].double(),
        covariance=statistics["covariance"].double(),
        heads=heads,
        reader=reader,
    )


_AGAIN = "Install its zoo again: dacc, or what was added by dacc zoo add."


def _questions(folder: Path, facts: dict[str, Any], num_labels: int) -> tuple[tuple[Head, ...], CaptionReader | None]:
    """The heads of a judge, and the reader of the captions that they can check."""
    try:
        heads = tuple(Head.model_validate(head) for head in facts.get("heads", ()))
        if heads and sum(len(head.labels) for head in heads) != num_labels:
            raise ValueError(f"heads do not share out the {num_labels} logits")
        return heads, CaptionReader(Grammar.model_validate(facts["caption"]), heads) if "caption" in facts else None
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
    except ValueError as error:
        problem = str(error)
    raise ModelError(f"{folder / 'reference.json'}: {problem}.", mend=_AGAIN)


def _quiet(load: Any, folder: Path) -> Any:
    """Load without the library's progress bar."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return load(folder, local_files_only=True, use_safetensors=True)
