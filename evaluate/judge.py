"""The judge of a zoo pipeline: a small classifier, and the statistics of its features on real images.

It answers one question (which digit?) or several, each by a head: a stretch of its logits, one for each label. A judge
of clips reads pairs of their frames, see `clip.py`.
Letters: N images or clips, F frames, D feature width, Q questions (heads).
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
from .clip import ClipReader, clip_answers, clip_features, pairs_of

BATCH = 256


@dataclass(frozen=True)
class Judged:
    """What the judge says of images or clips."""

    features: Tensor  # (N, D) float32
    answers: Tensor  # (N, Q) int64, the likeliest label of every head; clips: (N, F + 1), see `clip_answers`


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
    clip_reader: ClipReader | None = None  # the same for a judge of clips

    def fits(self, images: Tensor) -> bool:
        """Whether images (N, C, H, W) or clips (N, F, C, H, W) have the size that the judge was trained on."""
        return list(images.shape[1:]) == self.facts["input_size"]

    @torch.inference_mode()
    def look(self, images: Tensor) -> Judged:
        """Judge images (N, C, H, W) or clips (N, F, C, H, W) in [0, 1].

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
        scaled = images * (high - low) + low
        if self.clip_reader is not None:
            pairs = pairs_of(scaled)
            features, logits = (part.unflatten(0, pairs.shape[:2]) for part in self._read(pairs.flatten(0, 1)))
            return Judged(clip_features(features), clip_answers(logits, self.heads))
        features, logits = self._read(scaled)
        widths = [len(head.labels) for head in self.heads] or [logits.shape[-1]]
        answers = torch.stack([head.argmax(dim=-1) for head in logits.split(widths, dim=-1)], dim=-1)
        return Judged(features, answers)

    def _read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, D) and logits of images on the judge's scale."""
        pooled = torch.cat([self.model.base_model(batch).pooler_output for batch in images.split(BATCH)])
        return pooled.flatten(1), self.model.classifier(pooled)

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
    heads, reader, clip_reader = _questions(folder, facts, model.config.num_labels)
    return Judge(
        name=entry.judge,
        model=model,
        facts=facts,
        mean=statistics["mean"].double(),
        covariance=statistics["covariance"].double(),
        heads=heads,
        reader=reader,
        clip_reader=clip_reader,
    )


_AGAIN = "Install its zoo again: dacc, or what was added by dacc zoo add."


def _questions(
    folder: Path, facts: dict[str, Any], num_labels: int
) -> tuple[tuple[Head, ...], CaptionReader | None, ClipReader | None]:
    """The heads of a judge, and the reader of the captions that they can check: of images or of clips."""
    try:
        heads = tuple(Head.model_validate(head) for head in facts.get("heads", ()))
        if heads and sum(len(head.labels) for head in heads) != num_labels:
            raise ValueError(f"heads do not share out the {num_labels} logits")
        reader = CaptionReader(Grammar.model_validate(facts["caption"]), heads) if "caption" in facts else None
        return heads, reader, ClipReader(facts["captions"], heads) if "captions" in facts else None
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
