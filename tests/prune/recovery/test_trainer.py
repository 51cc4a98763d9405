"""Recovery as a whole: what it gains, that it repeats, can be interrupted, and leaves the teacher alone."""

import copy
import time
from dataclasses import replace

import pytest
import torch
from accelerate.state import PartialState

from dacc.core.errors import CalibrationError, UnsupportedError
from dacc.core.journal import Journal
from dacc.core.reporter import silent
from dacc.prune.noise import Noise
from dacc.prune.recovery import trainer as module
from dacc.prune.recovery.config import RecoveryConfig
from dacc.prune.recovery.lessons import Judge, split_lessons
from dacc.prune.recovery.training import Training, share_of_rate
from dacc.runtime.trajectory import DenoiserCall

from .conftest import state_of, toy_calls


def weights(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def judged(student, teacher):
    return Judge(split_lessons(toy_calls())[1], teacher, 0).error(student)


@pytest.mark.parametrize("trainable", ["full", "lora", "difffit"])
def test_the_error_on_calls_not_trained_on_falls_by_half(toy, train, trainable):
    student, teacher = toy()
    before, error = weights(teacher), judged(*toy())
    record = train(
        student, teacher, steps=150, trainable=trainable, learning_rate=3e-2 if trainable == "difffit" else 1e-2
    )
    assert record.error_before == pytest.approx(error)
    assert record.error_after < 0.5 * record.error_before
    assert judged(student, teacher) == pytest.approx(record.error_after, rel=1e-4)
    assert (record.steps, record.steps_done, record.trainable) == (150, 150, trainable)
    assert set(record.losses) == {"output", "feature"}
    assert equal(weights(teacher), before)
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.grad is None for network in (student, teacher) for parameter in network.parameters())


class Stop(Exception):
    pass


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_an_interrupted_run_goes_on_to_the_very_same_weights(toy, train, monkeypatch, trainable):
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(module, "SAVE_SHARE", 0.0)
    student, teacher = toy()
    whole = train(student, teacher, name="whole", trainable=trainable)
    other, _ = toy()
    update, done = module._Run.update, []

    def failing(self, training):
        if training.done in (9, 23) and training.done not in done:
            done.append(training.done)
            raise Stop
        update(self, training)

    monkeypatch.setattr(module._Run, "update", failing)
    for _ in range(2):
        with pytest.raises(Stop):
            train(other, teacher, name="parts", trainable=trainable)
        other, _ = toy()
    starts = []
    monkeypatch.setattr(
        module._Run, "update", lambda self, training: (starts.append(training.done), update(self, training))
    )
    assert train(other, teacher, name="parts", trainable=trainable) == whole
    assert starts[0] == 23
    assert equal(weights(other), weights(student))
    again, _ = toy()
    starts.clear()
    assert train(again, teacher, name="parts", trainable=trainable) == whole  # finished: nothing is trained anew
    assert equal(weights(again), weights(student))
    assert not starts


def test_a_run_goes_on_where_a_weight_never_gets_a_gradient(toy, train, stopped_before):
    """As the text stream of the last block of some transformers, when nothing inside is looked at."""

    def pair():
        student, teacher = toy()
        student.unused = torch.nn.Linear(2, 2)
        return student, teacher

    student, teacher = pair()
    whole = train(student, teacher, name="whole", steps=8)
    with stopped_before(5):
        train(*pair(), name="parts", steps=8)
    other, _ = pair()
    assert train(other, teacher, name="parts", steps=8) == whole
    assert equal(weights(other), weights(student))


def test_processor_time_adds_up_over_interruptions(toy, tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "process_time", lambda: now[0])
    parameters, journal = dict(toy()[0].named_parameters()), Journal(tmp_path, "key")
    journal.open(resume=True)

    def new():
        return Training(parameters, RecoveryConfig(steps=9), 1e-3, 1.0)

    def step(training, seconds):
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        training.step()
        now[0] += seconds

    first = new()
    for seconds in (3.0, 2.0):
        step(first, seconds)
        first.save(journal, {})
    now[0] = 7.0  # another process
    second = new()
    now[0] += 50.0
    second.load(journal)
    assert second.cpu_seconds == 5.0
    step(second, 4.0)
    second.save(journal, {})
    assert (second.done, second.cpu_seconds) == (3, 9.0)


def test_a_checkpoint_of_another_run_is_not_taken_up(toy, train):
    student, teacher = toy()
    train(student, teacher, steps=4)
    other, _ = toy()
    assert train(other, teacher, steps=6).steps_done == 6
    fresh, _ = toy()
    train(fresh, teacher, steps=6, name="other")
    assert equal(weights(other), weights(fresh))


def test_training_repeats_by_seed(toy, train):
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        student, teacher = toy()
        train(student, teacher, seed=seed, name=name, steps=12)
        found.append(weights(student))
    assert equal(found[0], found[1])
    assert not equal(found[0], found[2])


def test_room_for_the_teachers_answers_changes_nothing(toy, train):
    found = []
    for name, room in (("a", 1.0), ("b", 1e-9)):
        student, teacher = toy()
        train(student, teacher, cache_gb=room, name=name, steps=12)
        found.append(weights(student))
    assert equal(*found)


def test_training_stops_where_nothing_is_gained_any_more(toy, train):
    student, teacher = toy()
    before, reporter = weights(student), silent()
    record = train(student, teacher, learning_rate=1e-30, checks=10, patience=2, reporter=reporter)
    # the first check is what the others are compared with; ten updates are the least between two
    assert (record.stopped, record.steps_done) == ("plateau", 30)
    assert record.error_after == record.error_before
    assert equal(weights(student), before)
    assert any("did not lower the error" in text for text in reporter.notices)
    student, teacher = toy()
    assert train(student, teacher, learning_rate=1e-30, patience=0, name="two").stopped == "finished"


def test_a_training_that_is_on_its_way_back_goes_on(toy, train, monkeypatch):
    """Large rates first make worse what was cut with little harm."""
    errors = iter([0.1, 0.9, 0.7, 0.5, 0.3, 0.2, 0.05, 0.0499, 0.0498, 0.0497, 0.0])
    monkeypatch.setattr(module.Judge, "error", lambda *_: next(errors))
    record = train(*toy(), steps=200, checks=10, patience=3)
    assert (record.stopped, record.steps_done) == ("plateau", 180)
    assert (record.error_before, record.error_after) == (0.1, 0.0497)


def test_a_training_that_diverges_keeps_the_best_weights(toy, train):
    student, teacher = toy()
    reporter = silent()
    record = train(student, teacher, learning_rate=1e30, clip=0, reporter=reporter)
    assert record.stopped == "diverged"
    assert record.error_after <= record.error_before
    assert judged(student, teacher) == pytest.approx(record.error_after, rel=1e-4)
    assert any("diverged" in text for text in reporter.notices)
    again = silent()
    train(*toy(), learning_rate=1e30, clip=0, reporter=again)  # as a run does that was interrupted after the training
    assert again.notices == reporter.notices


def test_the_average_is_judged_and_kept(toy, train):
    """With an average that hardly moves, hardly anything is kept of one step."""
    student, teacher = toy()
    start = weights(student)
    train(student, teacher, steps=20, ema=0.999, checks=1, name="a")
    slow = max((student.state_dict()[key] - start[key]).abs().max() for key in start)
    student, _ = toy()
    train(student, teacher, steps=20, ema=0.0, checks=1, name="b")
    fast = max((student.state_dict()[key] - start[key]).abs().max() for key in start)
    assert 0 < slow < fast


def test_taps_of_other_shapes_are_refused(toy, train):
    with pytest.raises(UnsupportedError, match="blocks.0 and proj_out cannot be compared.*8.*4"):
        train(*toy(), taps=[("blocks.0", "proj_out")])


def test_a_student_made_of_the_teachers_own_tensors_leaves_it_alone(toy, train):
    student, teacher = toy()
    student.load_state_dict({name: teacher.state_dict()[name] for name in student.state_dict()}, assign=True)
    assert student.proj_in.weight.data_ptr() == teacher.proj_in.weight.data_ptr()
    before = weights(teacher)
    train(student, teacher, steps=10)
    assert equal(weights(teacher), before)
    assert not torch.equal(student.proj_in.weight, teacher.proj_in.weight)


def test_losses_that_some_calls_lack_are_means_of_the_others(toy):
    training = Training(dict(toy()[0].named_parameters()), RecoveryConfig(), 1e-3, 1.0)
    for told in ({"output": 1.0, "motion": 4.0}, {"output": 2.0}, {"output": 3.0, "motion": 6.0}):
        training.note(told)
    assert training.losses() == {"output": 2.0, "motion": 5.0}


def test_another_set_of_calls_is_another_run(toy, train):
    student, teacher = toy()
    train(student, teacher, steps=4)
    calls = [replace(call, args=(call.args[0] + 1, call.args[1])) for call in toy_calls()]
    other, _ = toy()
    train(other, teacher, calls, steps=4)
    fresh, _ = toy()
    train(fresh, teacher, calls, steps=4, name="other")
    assert equal(weights(other), weights(fresh))
    assert not equal(weights(other), weights(student))


def with_truth(teacher):
    """The toy's calls as if pictures had entered of which the teacher is half wrong."""
    found = []
    for call in toy_calls():
        answer = call.replay(teacher)[0]
        found.append(replace(call, truth=(answer + 0.5, torch.zeros_like(answer))))
    return found


def test_pictures_are_learned_from_where_their_noise_is_understood(toy, train):
    told, shown = silent(), with_truth(toy()[1])
    for name, calls, noise in (("plain", None, Noise()), ("task", shown, Noise("sample")), ("unknown", shown, None)):
        student, teacher = toy()
        losses = train(student, teacher, calls, noise=noise, name=name, reporter=told).losses
        assert set(losses) == ({"output", "feature", "task"} if name == "task" else {"output", "feature"})
        assert any("your pictures" in text for text in told.notices) == (name == "unknown")


def test_a_heavier_task_leads_nearer_to_the_pictures(toy, train):
    errors = []
    for weight in (0.0, 1.0):
        student, teacher = toy()
        calls = with_truth(teacher)
        train(student, teacher, calls, noise=Noise("sample"), name=str(weight), task_weight=weight, steps=150)
        given = [call.replay(student)[0] - call.truth[0] for call in calls]
        errors.append(sum(float(wrong.square().mean()) for wrong in given))
    assert errors[1] < 0.8 * errors[0]


def test_one_call_is_too_little(toy, train):
    with pytest.raises(CalibrationError, match="--samples"):
        train(*toy(), toy_calls(1, 1))


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_gradient_checkpointing_changes_no_result(dit_pipeline, train, trainable):
    found = []
    for checkpointing in (False, True):
        teacher = dit_pipeline().transformer
        student = copy.deepcopy(teacher)
        student.transformer_blocks = student.transformer_blocks[:1]
        calls = [
            DenoiserCall(
                "transformer", state_of(0, call, 2), (torch.randn(2, 4, 8, 8, generator=_generator(call)),), _dit()
            )
            for call in range(2)
        ]
        taps = [("transformer_blocks.0", "transformer_blocks.1")]
        name, fields = str(checkpointing), {"trainable": trainable, "gradient_checkpointing": checkpointing}
        train(student, teacher, calls, taps=taps, steps=2, checks=1, name=name, **fields)
        assert not student.is_gradient_checkpointing
        found.append(weights(student))
    assert all(torch.allclose(found[0][key], found[1][key], atol=1e-6) for key in found[0])


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def _dit():
    return {"timestep": torch.tensor([500, 500]), "class_labels": torch.tensor([1, 2])}


def test_products_in_16_bits_train_too_and_accelerate_is_left_as_it_was(toy, train):
    student, teacher = toy()
    record = train(student, teacher, precision="bf16", steps=60, learning_rate=1e-2)
    assert record.error_after < record.error_before
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert PartialState._shared_state == {}


def test_progress_tells_losses(toy, train, capsys, monkeypatch):
    from dacc.core import reporter as speaking

    monkeypatch.setattr(speaking, "LOG_SECONDS", 0.0)
    train(*toy(), steps=4, reporter=speaking.Reporter())
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("recover: output 0.")
    assert "feature 0." in lines[0]
    assert "held out 0." in lines[0]
    assert "s left" in lines[0]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_rate_rises_and_falls(schedule):
    shares = [share_of_rate(done, 100, schedule) for done in range(100)]
    assert shares[0] == 0.5
    assert max(shares) == 1
    assert shares[2] == 1
    assert shares[-1] == 1 if schedule == "constant" else shares[-1] < 0.02
    assert shares[2:] == sorted(shares[2:], reverse=True)
