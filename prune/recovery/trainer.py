"""Train a pruned denoiser against the one that it was cut from, on the whole one's own samples, without other data.

    loss = output + feature        see `losses.py`; of video `icmd.py`

The student sees what entered the teacher in its own runs, so no mistake of the student changes what it is shown. An
average of the weights over the last updates is judged on calls that are not trained on; the best one is kept.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...core.journal import Journal
from ...core.manifest import RecoveryRecord
from ...core.reporter import Reporter
from ...core.seeds import named_seed
from ...core.tensor_file import content_hash
from ...runtime.trajectory import DenoiserCall
from ..noise import Noise
from .backend import accelerated
from .config import RecoveryConfig
from .icmd import objective_for
from .lessons import Judge, Lessons, split_lessons
from .objective import Lesson, Objective
from .taps import Answer, answer, check_taps, placed
from .trainable import training_
from .training import Training

if TYPE_CHECKING:
    from accelerate import Accelerator

SAVE_SECONDS = 30.0  # between two checkpoints
SAVE_SHARE = 20  # so many times as long as one takes passes between them
LEAST_BETWEEN_CHECKS = 10  # updates: judging costs more than a few of them, and a single one is no time to be patient
LEAST_GAIN = 0.005  # of the error; less than this is no gain to the patience
RATES = {"full": 5e-5, "lora": 3e-4, "difffit": 2e-3}  # for LARGE parameters
LARGE = 1e9


@dataclass(frozen=True)
class Recovery:
    """A training that has come to its end."""

    record: RecoveryRecord
    cpu_seconds: float  # of training and judging, over all interruptions; what these lost is not counted


def recover(
    student: nn.Module,
    teacher: nn.Module,
    calls: Iterable[DenoiserCall],
    config: RecoveryConfig,
    *,
    taps: Sequence[tuple[str, str]],
    seed: int,
    checkpoint: Path,
    reporter: Reporter,
    noise: Noise | None = None,
) -> Recovery:
    """Train `student` in place; it has the best weights seen, the first ones included, and is in evaluation mode.

    Args:
        calls: what entered the teacher in its runs, from a calibration set.
        taps: modules of student and teacher whose outputs should agree; they must have equal shapes.
        checkpoint: a folder for this training alone; a run that was interrupted goes on from there.
        noise: what the teacher predicts; without it videos have no loss of motion.

    Raises:
        CalibrationError: too few calls.
        UnsupportedError: outputs cannot be compared, or there is nothing to train.
        ConfigError: the process has set accelerate up otherwise.
    """
    learned, judged = split_lessons(calls)
    student.eval()
    _part_(student, teacher)
    generator = torch.Generator().manual_seed(named_seed(seed, "start"))
    device = next(student.parameters()).device
    with _frozen(teacher), accelerated(device, config.precision) as accelerator:
        _check(student, teacher, learned[0], taps)
        journal = Journal(checkpoint, _run_key(student, learned, config, [taps, noise and asdict(noise), seed]))
        journal.open(resume=True)
        judge = Judge(judged, teacher, seed)
        with training_(student, config, generator) as parameters, _checkpointing(student, config):
            rate = config.learning_rate or usual_rate(config, sum(one.numel() for one in teacher.parameters()))
            training = Training(parameters, config, rate, judge.error(student))
            objective = objective_for(config, teacher, learned, noise, seed, reporter)
            run = _Run(student, teacher, config, taps, seed, accelerator, learned, objective)
            run.objective.load(training.load(journal))
            _train(run, training, judge, journal, reporter)
            training.put(training.best)
    return Recovery(_record(training), training.cpu_seconds)


@dataclass
class _Run:
    """What stays as it is during a training."""

    student: nn.Module
    teacher: nn.Module
    config: RecoveryConfig
    taps: Sequence[tuple[str, str]]
    seed: int
    accelerator: Accelerator
    learned: Sequence[DenoiserCall]
    objective: Objective

    def __post_init__(self) -> None:
        wanted = self.config.feature_weight > 0
        self.ours, self.theirs = ([pair[side] for pair in self.taps if wanted] for side in (0, 1))
        self.lessons = Lessons(self.learned, self.ask, self.config.cache_gb, self.seed)

    def ask(self, call: DenoiserCall) -> Answer:
        """What the teacher answers."""
        with self.accelerator.autocast():
            return answer(self.teacher, placed(call, self.teacher), self.theirs)

    def update(self, training: Training) -> None:
        """Learn from one batch of calls."""
        batch = self.config.batch
        for number in range(training.done * batch, (training.done + 1) * batch):
            index = self.lessons.draw(number)
            call = placed(self.lessons.call(index), self.student)
            lesson = Lesson(call, self.lessons.answer(index), training.done, named_seed(self.seed, f"call {number}"))
            with torch.enable_grad():
                with self.accelerator.autocast():
                    given = answer(self.student, call, self.ours)
                loss, told = self.objective.terms(given, lesson)
                self.accelerator.backward(loss / batch)
            training.note(told)
        if self.config.clip:
            self.accelerator.clip_grad_norm_(training.parameters.values(), self.config.clip)
        training.step()


def _train(run: _Run, training: Training, judge: Judge, journal: Journal, reporter: Reporter) -> None:
    steps, every = run.config.steps, max(LEAST_BETWEEN_CHECKS, ceil(run.config.steps / run.config.checks))
    saved, pause = time.monotonic(), SAVE_SECONDS

    def title() -> str:
        losses = ", ".join(f"{name} {value:.4f}" for name, value in training.losses().items())
        return f"recover: {losses or 'start'}, held out {training.least:.4f}"

    for _ in reporter.progress(range(training.done, steps if not training.stopped else training.done), title):
        if training.done % every == 0:
            training.sums, training.counts = {}, {}
        run.update(training)
        if not all(value < float("inf") for value in training.sums.values()):
            training.stopped = "diverged"
            break
        if training.done % every == 0 or training.done == steps:
            _check_gain(run, training, judge)
        if training.stopped:
            break
        if time.monotonic() - saved >= pause:
            before = time.monotonic()
            training.save(journal, run.objective.tensors())
            saved = time.monotonic()
            pause = max(SAVE_SECONDS, SAVE_SHARE * (saved - before))
    training.stopped = training.stopped or "finished"
    training.save(journal, run.objective.tensors())
    if training.stopped == "diverged":  # told here: an interrupted run may only come back to it
        reporter.notice(f"training diverged at update {training.done}; the best weights before it are kept.")
    if training.least >= training.error_before:
        reporter.notice(f"recovery for {training.done} steps did not lower the error; the weights stay as cut.")


def _check_gain(run: _Run, training: Training, judge: Judge) -> None:
    """Keep the average if it is the best so far; stop when training has got no further for long.

    Large rates first lead away from weights that were cut with little harm: what counts is the way back.
    """
    with training.averaged():
        error = judge.error(run.student)
    further = training.reached is None or error < (1 - LEAST_GAIN) * training.reached
    training.stale = 0 if further else training.stale + 1
    training.reached = error if training.reached is None else min(error, training.reached)
    if error < training.least:
        training.least = error
        training.best = {name: value.clone() for name, value in training.average.items()}
    if run.config.patience and training.stale >= run.config.patience and training.done < run.config.steps:
        training.stopped = "plateau"


def _record(training: Training) -> RecoveryRecord:
    return RecoveryRecord(
        steps=training.config.steps,
        steps_done=training.done,
        stopped=training.stopped,  # type: ignore[arg-type]
        trainable=training.config.trainable,
        trained_parameters=sum(parameter.numel() for parameter in training.parameters.values()),
        learning_rate=training.rate,
        error_before=training.error_before,
        error_after=training.least,
        losses=training.losses(),
    )


def usual_rate(config: RecoveryConfig, parameters: int) -> float:
    """The learning rate where none is asked for; smaller networks take larger ones, by the cube root of their size.

    Args:
        parameters: of the teacher.
    """
    return float(f"{RATES[config.trainable] * (LARGE / parameters) ** (1 / 3):.2g}")


@torch.no_grad()
def _check(student: nn.Module, teacher: nn.Module, call: DenoiserCall, taps: Sequence[tuple[str, str]]) -> None:
    ours = answer(student, placed(call, student), [pair[0] for pair in taps])
    theirs = answer(teacher, placed(call, teacher), [pair[1] for pair in taps])
    check_taps(ours, theirs, taps)


def _run_key(student: nn.Module, learned: Sequence[DenoiserCall], config: RecoveryConfig, others: list[object]) -> str:
    """Identity of a training: another one does not go on from its checkpoint."""
    weights = content_hash({name: value.detach().cpu() for name, value in student.state_dict().items()})
    ends = [leaf for call in (learned[0], learned[-1]) for leaf in tree_leaves((call.args, call.kwargs))]
    shown = content_hash({str(number): leaf for number, leaf in enumerate(ends) if isinstance(leaf, Tensor)})
    facts = [weights, len(learned), shown, config.model_dump(mode="json"), others]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _part_(student: nn.Module, teacher: nn.Module) -> None:
    """Give the student memory of its own: one that was made of the teacher's weights may share them."""
    theirs = {parameter.untyped_storage().data_ptr() for parameter in teacher.parameters()}
    assert not {id(one) for one in student.parameters()} & {id(one) for one in teacher.parameters()}
    for parameter in student.parameters():
        if parameter.untyped_storage().data_ptr() in theirs:
            parameter.data = parameter.data.clone()


@contextmanager
def _frozen(teacher: nn.Module) -> Iterator[None]:
    """The teacher without gradients and without dropout; as it was, afterwards."""
    before, mode = {parameter: parameter.requires_grad for parameter in teacher.parameters()}, teacher.training
    teacher.eval().requires_grad_(False)
    try:
        yield
    finally:
        teacher.train(mode)
        for parameter, needed in before.items():
            parameter.requires_grad_(needed)


@contextmanager
def _checkpointing(student: nn.Module, config: RecoveryConfig) -> Iterator[None]:
    """diffusers' own gradient checkpointing, while it lasts."""
    if not config.gradient_checkpointing:
        yield
        return
    student.enable_gradient_checkpointing()  # type: ignore[operator]
    try:
        yield
    finally:
        student.disable_gradient_checkpointing()  # type: ignore[operator]
