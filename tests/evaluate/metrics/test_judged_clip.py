from __future__ import annotations

import pytest
import torch

from dacc.evaluate.caption import Head
from dacc.evaluate.clip import ClipReader
from dacc.evaluate.judge import Judge, Judged
from dacc.evaluate.metrics import Case, frechet, judged_caption, judged_class, judged_clip
from dacc.evaluate.statistics import wilson_interval
from dacc.runtime.compare import Samples

HEADS = (Head(name="digit", labels=("zero", "one")), Head(name="direction", labels=("left", "right", "still")))
RIGHT = [1, 1, 1, 1, 0]  # one in four frames, moving left
FLICKERS = [1, 0, 1, 1, 0]
TURNED = [1, 1, 1, 1, 1]


def case_of(answers: list[list[int]], prompts: list[str]) -> Case:
    clips = torch.zeros(len(answers), 4, 1, 8, 8)
    reader = ClipReader(("{digit} moving {direction}",), HEADS)
    return Case(
        samples=Samples(clips, clips),
        seeds=tuple(range(len(answers))),
        prompts=tuple(prompts),
        judge=Judge("clips", None, {}, torch.zeros(2), torch.eye(2), heads=HEADS, clip_reader=reader),
        judged=Judged(torch.randn(len(answers), 2, generator=torch.Generator().manual_seed(0)), torch.tensor(answers)),
    )


def test_frames_motion_and_whole_captions_are_counted() -> None:
    found = judged_clip.compute(case_of([RIGHT, FLICKERS, TURNED, RIGHT], ["one moving left"] * 4))
    assert {name: metric.value for name, metric in found.items()} == {
        "digit_accuracy": pytest.approx(15 / 16),
        "motion_accuracy": 0.75,
        "caption_accuracy": 0.5,
    }
    assert (found["digit_accuracy"].worst, found["digit_accuracy"].worst_seed) == (0.75, 1)
    assert (found["motion_accuracy"].low, found["motion_accuracy"].high) == wilson_interval(3, 4)
    assert {metric.count for metric in found.values()} == {4}


def test_prompts_that_the_judge_cannot_read_are_left_out_and_counted() -> None:
    found = judged_clip.compute(case_of([RIGHT, FLICKERS], ["one moving left", "a lighthouse at dusk"]))
    assert found["motion_accuracy"].count == 1
    assert all("1 of 2 clips left out" in str(metric.note) for metric in found.values())
    strange = case_of([RIGHT], ["a lighthouse at dusk"])
    assert judged_clip.compute(strange) == {}
    assert "cannot read" in judged_clip.why_nothing(strange)


def test_metrics_of_images_say_nothing_of_clips_and_the_distance_has_a_name_of_its_own() -> None:
    case = case_of([RIGHT, RIGHT, RIGHT], ["one moving left"] * 3)
    assert judged_caption.compute(case) == judged_class.compute(case) == {}
    assert judged_caption.why_nothing(case) == "the judge clips knows no captions of images"
    assert set(frechet.compute(case)) == {"frechet_video"}
