"""Whether a clip shows what its caption says, as the judge reads it: the share of frames that show the right digit
(`digit_accuracy`), and the shares of clips in which it moves the right way (`motion_accuracy`) and in which both are
right, in every frame (`caption_accuracy`)."""

from __future__ import annotations

from ..clip import CONTENT, MOTION
from ..result import Metric
from ..statistics import share, summarize
from . import Case

NEEDS = ("judge", "prompts")


def compute(case: Case) -> dict[str, Metric]:
    """Shares with 95 % intervals over clips: bootstrapped for the digit, since the frames of a clip are alike, else
    Wilson's. Nothing when the judge knows no clips, or no prompt is a caption."""
    assert case.judge is not None
    assert case.judged is not None
    assert case.prompts is not None
    if case.judge.clip_reader is None:
        return {}
    labels = {head.name: head.labels for head in case.judge.heads}
    digits: list[float] = []
    motions: list[bool] = []
    seeds: list[int] = []
    for prompt, seed, (*frames, motion) in zip(case.prompts, case.seeds, case.judged.answers.tolist(), strict=True):
        if asked := case.judge.clip_reader.read(prompt):
            digits.append(sum(labels[CONTENT][frame] == asked[CONTENT] for frame in frames) / len(frames))
            motions.append(labels[MOTION][motion] == asked[MOTION])
            seeds.append(seed)
    if not seeds:
        return {}
    strangers = len(case.seeds) - len(seeds)
    note = (
        f"{strangers} of {len(case.seeds)} clips left out, whose prompts the judge cannot read" if strangers else None
    )
    return {
        "digit_accuracy": summarize(digits, seeds, better="higher").model_copy(update={"note": note}),
        "motion_accuracy": share(motions, note=note),
        "caption_accuracy": share(
            [digit == 1 and motion for digit, motion in zip(digits, motions, strict=True)], note=note
        ),
    }


def why_nothing(case: Case) -> str:
    """Why there are no shares."""
    assert case.judge is not None
    if case.judge.clip_reader is None:
        return f"the judge {case.judge.name} knows no captions of clips"
    return "the judge cannot read any of the prompts"
