"""Whether the picture shows what its caption says, as the judge reads it: shares of images in which both objects have
the right shape, colour or size (`shape_accuracy` and so on), in which they lie to each other as asked
(`relation_accuracy`), and in which all of that is so (`caption_accuracy`)."""

from __future__ import annotations

from ..caption import agreement
from ..result import Metric
from ..statistics import share
from . import Case

NEEDS = ("judge", "prompts")


def compute(case: Case) -> dict[str, Metric]:
    """Shares with Wilson's 95 % intervals; nothing when the judge knows no captions, or no prompt is one."""
    assert case.judge is not None
    assert case.judged is not None
    assert case.prompts is not None
    if case.judge.reader is None:
        return {}
    asked = [case.judge.reader.read(prompt) for prompt in case.prompts]
    seen = case.judge.scenes(case.judged)
    found = [agreement(scene, picture) for scene, picture in zip(asked, seen, strict=True) if scene]
    if not found:
        return {}
    strangers = len(asked) - len(found)
    note = f"{strangers} of {len(asked)} images left out, whose prompts the judge cannot read" if strangers else None
    return {f"{name}_accuracy": share([right[name] for right in found], note=note) for name in found[0]}


def why_nothing(case: Case) -> str:
    """Why there are no shares."""
    assert case.judge is not None
    if case.judge.reader is None:
        return f"the judge {case.judge.name} knows no captions of images"
    return "the judge cannot read any of the prompts"
