"""Train what was quantized against the float network, from end to end: the quantized network learns to give, for the
same noisy samples, what the float network gives. The samples come from the float pipeline alone, so that no mistake of
the student changes what it is shown, and no data are needed.

    loss = w[call] ||e - e^||^2 / ||e||^2    e: outputs of the float network in one denoiser call, e^: of the student

w is 1, or, ours, in proportion to how far an error at the call moves the final sample (`calibrate/sensitivity.py`).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from ..calibrate.held_out import split_calls
from ..core.config import Config
from ..core.errors import UnsupportedError
from ..core.reporter import Reporter
from ..runtime.weight import QuantizedWeight, to_rows
from .block import Block, Sighting, Treated
from .checkpoint import Checkpoint
from .learn_scales import LearnedScale
from .ranges import roundings_of
from .reconstruct import LADDER, relative_error
from .sequential import in_16_bits

CHECKS = 10  # times that the student is judged
SAVE_SECONDS = 30.0  # between two checkpoints
OVERHEAD = 1.5  # rounding activations, judging and saving, against the bare updates


class DistillConfig(Config):
    """Fields of `--set` that say how long and how carefully to train."""

    updates: int = Field(0, ge=0)  # each looks at one call; more: better, longer; 0: as many as fit into `minutes`
    minutes: float = Field(10.0, gt=0)  # of training, when the updates are chosen
    clip: float = Field(0.0, ge=0)  # largest norm of the gradients of all parameters together; 0: any
    # of calls in the loss; sensitivity: by how far an error in what the denoiser gives there moves the final sample
    weigh: Literal["equally", "sensitivity"] = "equally"


class LearnedWeight(Protocol):
    """A weight with parameters of its own."""

    def __call__(self) -> Tensor:
        """The rows (O, K) that its integers stand for, with gradients."""

    def result(self) -> QuantizedWeight:
        """The weight as it is now, folded."""


@dataclass(frozen=True)
class Student:
    """What is learned of a network, by layer name, and how fast."""

    weights: Mapping[str, LearnedWeight]
    scales: Mapping[str, LearnedScale]
    biases: Mapping[str, nn.Parameter]  # (O,) float32
    rates: Sequence[tuple[Sequence[nn.Parameter], float]]  # parameters, learning rate

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All of them, in a fixed order."""
        return [parameter for group, _ in self.rates for parameter in group]

    def outputs(self, block: Block, sighting: Sighting) -> tuple[Tensor, ...]:
        """What the student gives in one call, with gradients."""
        with block.rounding.instead(dict(self.scales)):
            return block.run(sighting, {name: weight() for name, weight in self.weights.items()}, self.biases)

    def folded(self, starts: Mapping[str, Treated]) -> dict[str, Treated]:
        """The layers as they are now: integers and scales only."""
        found = dict(starts)
        for name, weight in self.weights.items():
            found[name] = replace(found[name], weight=weight.result(), method=None)
        for name, scale in self.scales.items():
            found[name] = replace(found[name], acts=scale.result())
        for name, bias in self.biases.items():
            found[name] = replace(found[name], bias=in_16_bits(bias.detach()))
        return found


class Training:
    """A student on its way: everything that an interrupted run needs to go on.

    Args:
        starts: what the student starts from; kept where training does not help.
        updates: from the first to the last one.
    """

    def __init__(self, student: Student, starts: Mapping[str, Treated], updates: int, seed: int) -> None:
        self.student, self.starts, self.updates, self.done = student, dict(starts), updates, 0
        groups = [{"params": list(parameters), "lr": rate} for parameters, rate in student.rates]
        self.optimizer = torch.optim.Adam(groups)
        self.generator = torch.Generator().manual_seed(seed)
        self.least = float("inf")
        self.best: dict[str, Treated] | None = None  # None: the start

    def update(self, block: Block, clip: float) -> float:
        """Learn from one call; returns the loss before it."""
        sighting = block.drawn(self.generator)
        assert sighting.target is not None
        self.optimizer.zero_grad(set_to_none=True)  # so that scales of other calls stay where they are
        with torch.enable_grad():
            loss = sighting.weight * relative_error(self.student.outputs(block, sighting), sighting.target)
            loss.backward()  # type: ignore[no-untyped-call]
        if clip:
            nn.utils.clip_grad_norm_(self.student.parameters, clip)
        for group, (_, rate) in zip(self.optimizer.param_groups, self.student.rates, strict=True):
            group["lr"] = rate * (1 - self.done / self.updates)
        self.optimizer.step()
        self.done += 1
        return float(loss.detach())

    def judge(self, judge: Block) -> None:
        """Keep what is there now if it is the best so far."""
        found = self.student.folded(self.starts)
        if (error := error_of(judge, found)) < self.least:
            self.least, self.best = error, found

    def save(self, checkpoint: Checkpoint) -> None:
        """All that changes, as a few long tensors."""
        parameters = self.student.parameters
        states = [self.optimizer.state.get(parameter, {}) for parameter in parameters]
        tensors = {"parameters": _joined(parameters), "generator": self.generator.get_state()}
        for key in ("exp_avg", "exp_avg_sq"):
            found = [state.get(key, torch.zeros_like(p)) for state, p in zip(states, parameters, strict=True)]
            tensors[key] = _joined(found)
        tensors["steps"] = torch.stack([torch.as_tensor(state.get("step", 0.0)).float() for state in states])
        for name, treated in (self.best or {}).items():
            tensors |= {f"best.{name}.{key}": value for key, value in treated.tensors().items()}
        checkpoint.save(tensors, {"done": self.done, "least": self.least, "improved": self.best is not None})

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on where the last checkpoint was made; nothing happens where there is none."""
        parameters = self.student.parameters
        if (kept := checkpoint.load(parameters[0].device)) is None:
            return
        tensors, record = kept
        self.done, self.least = record["done"], record["least"]
        self.generator.set_state(tensors["generator"].cpu())
        sizes = [parameter.numel() for parameter in parameters]
        columns = [tensors[key].split(sizes) for key in ("parameters", "exp_avg", "exp_avg_sq")]
        with torch.no_grad():
            for parameter, value, mean, square, step in zip(parameters, *columns, tensors["steps"].cpu(), strict=True):
                parameter.copy_(value.view_as(parameter))
                if step > 0:
                    averages = {"exp_avg": mean.view_as(parameter), "exp_avg_sq": square.view_as(parameter)}
                    self.optimizer.state[parameter] = {"step": step.clone()} | {
                        key: average.clone() for key, average in averages.items()
                    }
        if record["improved"]:
            self.best = {
                name: _restored(start, name, tensors, trained=name in self.student.weights)
                for name, start in self.starts.items()
            }


def distill(
    block: Block,
    starts: Mapping[str, Treated],
    student: Student,
    config: DistillConfig,
    updates: int,
    checkpoint: Checkpoint,
    reporter: Reporter,
) -> dict[str, Treated]:
    """Train the student; the best one seen on calls that it did not learn from, the start included.

    Args:
        block: the whole network, computing with `starts`.

    Raises:
        CalibrationError: too few calls.
        UnsupportedError: nothing can be learned.
    """
    check_trainable(student.weights)
    learned, judged = split_calls(block.sightings, [sighting.call for sighting in block.sightings])
    lesson, judge = replace(block, sightings=learned, merged=()), replace(block, sightings=judged, merged=())
    training = Training(student, starts, updates, block.seed)
    with _frozen(block):
        start = training.least = error_of(judge, starts)
        training.load(checkpoint)
        _train(training, lesson, judge, config.clip, checkpoint, reporter)
    if training.best is None:
        reporter.notice(f"training for {updates} updates did not lower the error; layers stay as they were before it.")
        return training.starts
    reporter.say(f"error of the outputs on calls not trained on: {start:.4f} before, {training.least:.4f} after")
    trained = {*student.weights, *student.scales, *student.biases}
    return {
        name: replace(found, output_error=training.least) if name in trained else found
        for name, found in training.best.items()
    }


def check_trainable(layers: Collection[object]) -> None:
    """Refuse a network of which nothing can be learned.

    Raises:
        UnsupportedError: there is no such layer.
    """
    if not layers:
        raise UnsupportedError(
            "no layer is left that can be trained.",
            "Embeddings and layers of the time stay as they were rounded.",
            "Widen --include or drop an --exclude, or choose another --method.",
        )


def _train(
    training: Training, lesson: Block, judge: Block, clip: float, checkpoint: Checkpoint, reporter: Reporter
) -> None:
    checks = {
        training.updates * (number + 1) // CHECKS for number in range(CHECKS)
    }  # not by time: same on all machines
    saved = time.monotonic()
    for number in reporter.progress(range(training.done, training.updates), "distill"):
        loss = training.update(lesson, clip)
        if not loss < float("inf"):
            reporter.notice(f"training diverged at update {number + 1}; the best state before it is kept.")
            return
        if training.done in checks:
            training.judge(judge)
        if time.monotonic() - saved >= SAVE_SECONDS:
            training.save(checkpoint)
            saved = time.monotonic()


def error_of(judge: Block, treated: Mapping[str, Treated]) -> float:
    """||e - e^|| / ||e|| with these layers, rounded as the kernels do it."""
    with torch.no_grad(), judge.rounding.instead(roundings_of(judge, dict(treated))):
        biases = {name: found.bias for name, found in treated.items() if found.bias is not None}
        return judge.error({name: to_rows(found.weight.dequantize()) for name, found in treated.items()}, biases)


def fitting_updates(seconds: float, config: DistillConfig, reporter: Reporter) -> int:
    """The largest round number of updates that fits into the time.

    Args:
        seconds: that one update takes.
    """
    fitting = 60 * config.minutes / (OVERHEAD * seconds)
    updates = next((count for count in LADDER if count <= fitting), LADDER[-1])
    reporter.say(f"an update takes {seconds:.2f} s here: {updates} of them")
    return updates


@contextmanager
def _frozen(block: Block) -> Iterator[None]:
    """No gradients for what is not learned."""
    before = {parameter: parameter.requires_grad for parameter in block.module.parameters()}
    block.module.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, needed in before.items():
            parameter.requires_grad_(needed)


def _joined(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([value.detach().flatten() for value in values])


def _restored(start: Treated, name: str, tensors: Mapping[str, Tensor], *, trained: bool) -> Treated:
    """A layer of the best state, as `Student.folded` gave it."""
    keys = [*start.tensors(), "bias"]
    found = {key: tensors[f"best.{name}.{key}"] for key in keys if f"best.{name}.{key}" in tensors}
    weight = start.weight
    return Treated.from_tensors(
        found,
        weight.scheme,
        weight.shape,
        method=None if trained else start.method,
        output_error=start.output_error,
    )
