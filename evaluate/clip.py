"""Clips as a judge sees them: pairs of frames, and captions that say what is shown and where it moves.

The judge of clips is an image classifier of two frames in one picture, channel behind channel. Each of its heads is a
field of the captions that it can check: `digit` is asked of every frame, `direction` of the clip.
Letters: N clips, F frames, D features of a pair, Q questions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from .caption import Head, Scene

CONTENT, MOTION = "digit", "direction"  # the heads of a judge of clips


def pairs_of(frames: Tensor) -> Tensor:
    """Frames (N, F, C, H, W) beside their successors, the last beside itself: (N, F, 2C, H, W)."""
    return torch.cat([frames, torch.cat([frames[:, 1:], frames[:, -1:]], dim=1)], dim=2)


def clip_features(pooled: Tensor) -> Tensor:
    """Features (N, 2D) of clips from those of their pairs (N, F, D): mean and standard deviation over time.

    The mean says what is shown and how it moves, the deviation whether that stays so. The last pair, which shows one
    frame twice, has no part.
    """
    moving = pooled[:, :-1]
    return torch.cat([moving.mean(dim=1), moving.std(dim=1, correction=0)], dim=-1)


def clip_answers(logits: Tensor, heads: Sequence[Head]) -> Tensor:
    """Answers (N, F + 1) from the logits of all pairs (N, F, sum of labels): the content of every frame, then the
    motion that is likeliest by all pairs of two frames together."""
    split = logits.split([len(head.labels) for head in heads], dim=-1)
    parts = {head.name: part for head, part in zip(heads, split, strict=True)}
    motion = parts[MOTION][:, :-1].log_softmax(dim=-1).sum(dim=1).argmax(dim=-1)
    return torch.cat([parts[CONTENT].argmax(dim=-1), motion[:, None]], dim=1)


class ClipReader:
    """Reads captions such as "seven moving left".

    Args:
        forms: what captions look like: words, and names of heads in braces.
        heads: of the judge.

    Raises:
        ValueError: a form has other fields than the two heads.
    """

    def __init__(self, forms: Sequence[str], heads: Sequence[Head]) -> None:
        labels = {head.name: head.labels for head in heads}
        if set(labels) != {CONTENT, MOTION}:
            raise ValueError(f"a judge of clips has the heads {CONTENT!r} and {MOTION!r}")
        self._forms = [_compiled(form, labels) for form in forms]

    def read(self, caption: str) -> Scene | None:
        """What a caption asks for; None when it has another form or other words."""
        for form in self._forms:
            if found := form.fullmatch(caption.strip()):
                return {name: word.lower() for name, word in found.groupdict().items()}
        return None


def _compiled(form: str, labels: dict[str, tuple[str, ...]]) -> re.Pattern[str]:
    """A form with the known words in place of its fields: any case, any white space."""
    if sorted(re.findall(r"{(.*?)}", form)) != sorted(labels):
        raise ValueError(f"the form {form!r} needs {', '.join(f'{{{name}}}' for name in labels)} once each")
    parts = []
    for word in form.split():
        name = word[1:-1] if word.startswith("{") else None
        parts.append(re.escape(word) if name is None else f"(?P<{name}>{'|'.join(map(re.escape, labels[name]))})")
    return re.compile(r"\s+".join(parts), re.IGNORECASE)
