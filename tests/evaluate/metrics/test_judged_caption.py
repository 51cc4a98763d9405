from __future__ import annotations

import torch

from dacc.evaluate.caption import CaptionReader, Grammar, Head
from dacc.evaluate.judge import Judge, Judged
from dacc.evaluate.metrics import Case, judged_caption, judged_class
from dacc.evaluate.statistics import wilson_interval
from dacc.runtime.compare import Samples

from ..conftest import CAPTION, HEADS

PROMPT = "a small red circle above a large blue square"
RIGHT = [0, 0, 0, 0, 1, 1, 1]  # vertical; small red circle; large blue square
LIES_BESIDE = [1, *RIGHT[1:]]
WRONG_COLOUR = [*RIGHT[:5], 0, RIGHT[6]]


def case_of(answers: list[list[int]], prompts: list[str] | None, *, knows_captions: bool = True) -> Case:
    heads = tuple(Head.model_validate(head) for head in HEADS)
    reader = CaptionReader(Grammar.model_validate(CAPTION), heads) if knows_captions else None
    images = torch.zeros(len(answers), 3, 32, 32)
    return Case(
        samples=Samples(images, images),
        seeds=tuple(range(len(answers))),
        prompts=tuple(prompts) if prompts else None,
        judge=Judge("shapes", None, {}, torch.zeros(1), torch.eye(1), heads=heads, reader=reader),
        judged=Judged(torch.zeros(len(answers), 1), torch.tensor(answers)),
    )


def test_shares_of_images_that_show_what_was_asked() -> None:
    found = judged_caption.compute(case_of([RIGHT, LIES_BESIDE, WRONG_COLOUR, RIGHT], [PROMPT] * 4))
    assert {name: metric.value for name, metric in found.items()} == {
        "shape_accuracy": 1.0,
        "colour_accuracy": 0.75,
        "size_accuracy": 1.0,
        "relation_accuracy": 0.75,
        "caption_accuracy": 0.5,
    }
    caption = found["caption_accuracy"]
    assert (caption.low, caption.high) == wilson_interval(2, 4)
    assert (caption.count, caption.better, caption.note) == (4, "higher", None)


def test_prompts_that_the_judge_cannot_check_are_left_out_and_counted() -> None:
    found = judged_caption.compute(case_of([RIGHT, WRONG_COLOUR], [PROMPT, "a lighthouse at dusk"]))
    assert found["caption_accuracy"].count == 1
    assert "1 of 2 images left out" in str(found["caption_accuracy"].note)
    assert judged_caption.compute(case_of([RIGHT], ["a lighthouse at dusk"])) == {}


def test_a_judge_without_captions_says_nothing() -> None:
    assert judged_caption.compute(case_of([RIGHT], [PROMPT], knows_captions=False)) == {}


def test_a_judge_of_several_questions_knows_no_class() -> None:
    assert judged_class.compute(case_of([RIGHT], [PROMPT])) == {}
