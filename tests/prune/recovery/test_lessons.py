"""What is learned from and what judges."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from dacc.prune.recovery.lessons import JUDGED, Judge, Lessons, split_lessons, spread
from dacc.prune.recovery.taps import Answer
from dacc.runtime.trajectory import DenoiserCall

from .conftest import toy_calls


def runs_of(calls):
    return {call.state.run for call in calls}


@pytest.mark.parametrize(("runs", "judging"), [(4, 1), (10, 1), (20, 2)])
def test_whole_runs_judge_where_there_are_enough(runs, judging):
    learned, judged = split_lessons(toy_calls(runs))
    assert len(runs_of(judged)) == judging
    assert not runs_of(learned) & runs_of(judged)
    assert len(learned) + len(judged) == runs * 6


def test_single_calls_judge_where_runs_are_few():
    learned, judged = split_lessons(toy_calls(2, 20))
    assert len(judged) == 4
    assert runs_of(learned) == runs_of(judged)


def test_calls_without_a_run_can_be_split_too():
    calls = [DenoiserCall("denoiser", None, call.args, {}) for call in toy_calls(1, 20)]
    learned, judged = split_lessons(calls)
    assert len(learned) + len(judged) == 20
    assert judged


def answering(asked):
    def ask(call):
        asked.append(call)
        return Answer(call.args[0] / 3, [(call.args[0],)])

    return ask


def test_every_round_shows_each_call_once_in_another_order():
    lessons = Lessons(toy_calls(2, 10), answering([]), 0.0, seed=3)
    rounds = [[lessons.draw(20 * turn + place) for place in range(20)] for turn in range(3)]
    assert all(sorted(turn) == list(range(20)) for turn in rounds)
    assert rounds[0] != rounds[1] != rounds[2]


def test_answers_are_kept_while_there_is_room():
    calls, asked = toy_calls(1, 4), []
    size = 2 * 2 * calls[0].args[0].numel()
    lessons = Lessons(calls, answering(asked), 2 * size / 1e9, seed=0)
    found = [lessons.answer(index) for _ in range(2) for index in range(4)]
    assert [call.state.call for call in asked] == [0, 1, 2, 3, 2, 3]
    assert all(torch.equal(found[index].output, found[index + 4].output) for index in range(4))
    assert found[0].output.dtype == torch.bfloat16


def test_without_room_answers_have_all_their_bits():
    calls = toy_calls(1, 1)
    assert torch.equal(Lessons(calls, answering([]), 0.0, seed=0).answer(0).output, calls[0].args[0] / 3)


def test_the_judge_takes_the_mean_of_relative_errors(toy):
    student, teacher = toy()
    calls = toy_calls(1, 3)
    with torch.no_grad():
        pairs = [(student(*call.args)[0], teacher(*call.args)[0]) for call in calls]
    slow = sum(float((one - other).norm() ** 2 / other.norm() ** 2) for one, other in pairs) / 3
    assert Judge(calls, teacher, 0).error(student) == pytest.approx(slow, rel=1e-5)
    assert Judge(calls, teacher, 0).error(teacher) == 0.0


def branches_apart(runs, calls):
    """Both guidance branches, one after the other at each call, as Wan evaluates them."""
    twice = [call for call in toy_calls(runs, calls) for _ in range(2)]
    return [
        replace(call, state=replace(call.state, evaluation=number % 2, branch=("cond", "uncond")[number % 2]))
        for number, call in enumerate(twice)
    ]


@pytest.mark.parametrize("runs", [1, 3])
def test_both_guidance_branches_judge_at_every_noise_level(runs):
    judging = spread(branches_apart(runs, 16), JUDGED, seed=0)
    assert Counter(call.state.branch for call in judging) == {"cond": 8, "uncond": 8}
    for branch in ("cond", "uncond"):
        levels = sorted(call.state.call // 2 for call in judging if call.state.branch == branch)
        assert levels == list(range(8))


def test_of_many_runs_every_noise_level_judges_once_and_not_by_one_run():
    judging = spread(toy_calls(16, 16), JUDGED, seed=0)
    assert sorted(call.state.call for call in judging) == list(range(16))
    assert len(runs_of(judging)) > 4


def test_what_judges_repeats_by_seed_and_few_calls_all_judge():
    calls = toy_calls(4, 16)
    first, second, other = ([id(call) for call in spread(calls, JUDGED, seed)] for seed in (0, 0, 1))
    assert first == second != other
    assert len(spread(calls[:5], JUDGED, 0)) == 5
