"""What images are trained with: the part that looks at a user's pictures."""

import pytest
import torch

from dacc.core.errors import UnsupportedError
from dacc.prune.noise import Noise
from dacc.prune.recovery.config import RecoveryConfig
from dacc.prune.recovery.objective import Lesson, Objective
from dacc.prune.recovery.taps import Answer
from dacc.runtime.trajectory import DenoiserCall

from .conftest import state_of

SIGMA = 0.5
ROWS, CHANNELS = 2, 3


def scene(branches=1, *, truth=True, sigma=SIGMA):
    """What a student gives, and its lesson."""
    generator = torch.Generator().manual_seed(1)
    clean, noise = (torch.randn(ROWS, CHANNELS, 4, 4, generator=generator) for _ in range(2))
    sample, student, teacher = (torch.randn(branches * ROWS, CHANNELS, 4, 4, generator=generator) for _ in range(3))
    call = DenoiserCall("unet", state_of(0, 1, 4, sigma), (sample, 5), {}, (clean, noise) if truth else None)
    return student, Lesson(call, Answer(teacher), 0, 0)


def wanted(target, clean, noise):
    """From each law by itself, with a^2 + s^2 = 1 and s / a = sigma."""
    alpha, share = 1 / (1 + SIGMA**2) ** 0.5, SIGMA / (1 + SIGMA**2) ** 0.5
    laws = {"epsilon": noise, "sample": clean, "v_prediction": alpha * noise - share * clean, "flow": noise - clean}
    return laws[target]


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("target", ["epsilon", "sample", "v_prediction", "flow"])
def test_the_task_is_what_the_noise_in_a_picture_asks_for(target, branches):
    student, lesson = scene(branches)
    right = torch.cat([wanted(target, *lesson.call.truth)] * branches).flatten().tolist()
    wrong = sum((one - other) ** 2 for one, other in zip(student.flatten().tolist(), right, strict=True))
    slow = wrong / sum(value**2 for value in right)
    total, told = Objective(RecoveryConfig(task_weight=0.25), Noise(target)).terms(Answer(student), lesson)
    assert told["task"] == pytest.approx(slow, rel=1e-5)
    assert float(total) == pytest.approx(told["output"] + 0.25 * slow, rel=1e-5)


def test_variances_that_are_learned_beside_the_noise_are_no_part_of_it():
    student, lesson = scene()
    beside = torch.cat([student, torch.full_like(student, 100.0)], 1)
    lesson = Lesson(lesson.call, Answer(beside), 0, 0)
    with_variances = Objective(RecoveryConfig(), Noise()).terms(Answer(beside), lesson)[1]["task"]
    without = Objective(RecoveryConfig(), Noise()).terms(Answer(student), scene()[1])[1]["task"]
    assert with_variances == pytest.approx(without)


@pytest.mark.parametrize(
    ("asked", "noise", "fields"),
    [
        ({"truth": False}, Noise(), {}),  # the first call of a run, and sets without pictures
        ({"sigma": None}, Noise(), {}),
        ({}, None, {}),
        ({}, Noise(), {"task_weight": 0.0}),
    ],
)
def test_without_pictures_a_level_a_law_or_a_weight_there_is_no_task(asked, noise, fields):
    student, lesson = scene(**asked)
    total, told = Objective(RecoveryConfig(**fields), noise).terms(Answer(student), lesson)
    assert set(told) == {"output"}
    assert float(total) == pytest.approx(told["output"])


def test_pictures_of_another_shape_are_refused():
    student, lesson = scene()
    lesson = Lesson(lesson.call, Answer(lesson.teacher.output[..., :2]), 0, 0)
    with pytest.raises(UnsupportedError, match=r"gives \(2, 3, 4, 2\), its pictures are \(2, 3, 4, 4\)") as refused:
        Objective(RecoveryConfig(), Noise()).terms(Answer(student[..., :2]), lesson)
    assert "task_weight=0" in str(refused.value.mend)
