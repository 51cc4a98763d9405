"""The judge of a zoo pipeline: a small classifier, and the statistics of its features on real images.

Letters: N images, D feature width, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..core.errors import ModelError
from ..core.safe_read import read_json
from ..core.zoo import ZooEntry

BATCH = 256


@dataclass(frozen=True)
class Judged:
    """What the judge says of images."""

    features: Tensor  # (N, D) float32
    classes: Tensor  # (N,) int64, the likeliest


@dataclass(frozen=True)
class Judge:
    """A classifier with reference statistics."""

    name: str
    model: Any  # a transformers image classifier
    facts: dict[str, Any]  # reference.json
    mean: Tensor  # (D,) float64
    covariance: Tensor  # (D, D) float64

    @torch.inference_mode()
    def look(self, images: Tensor) -> Judged:
        """Judge images (N, C, H, W) in [0, 1].

        Raises:
            ModelError: they do not have the size that the judge was trained on.
        """
        if list(images.shape[1:]) != self.facts["input_size"]:
            raise ModelError(
                f"images of shape {tuple(images.shape[1:])} do not fit the judge {self.name}, "
                f"which knows {tuple(self.facts['input_size'])}.",
                mend="Evaluate without the metrics frechet and judged_class.",
            )
        low, high = self.facts["value_range"]
        features, classes = [], []
        for batch in (images * (high - low) + low).split(BATCH):
            pooled = self.model.base_model(batch).pooler_output
            features.append(pooled.flatten(1))
            classes.append(self.model.classifier(pooled).argmax(dim=-1))
        return Judged(torch.cat(features), torch.cat(classes))


def load_judge(entry: ZooEntry) -> Judge | None:
    """The judge beside a zoo pipeline; None when its entry names none.

    Raises:
        ModelError: it is named but not there.
    """
    if entry.judge is None:
        return None
    from transformers import AutoModelForImageClassification

    folder = entry.path.parent / entry.judge
    if not (folder / "reference.safetensors").is_file():
        raise ModelError(f"the judge {folder} is missing.", mend="Install dacc again.")
    statistics = load_file(folder / "reference.safetensors")
    return Judge(
        name=entry.judge,
        model=_quiet(AutoModelForImageClassification.from_pretrained, folder).eval(),
        facts=read_json(folder / "reference.json"),
        mean=statistics["mean"].double(),
        covariance=statistics["covariance"].double(),
    )


def _quiet(load: Any, folder: Path) -> Any:
    """Load without the library's progress bar."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return load(folder, local_files_only=True, use_safetensors=True)
