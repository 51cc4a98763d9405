"""Depth masks that are learned together with low-rank updates of the weights, after TinyFusion (Fang et al., 2025,
CVPR), arXiv 2412.01199.

    y = one_hot(argmax z),    z = (s l + g) / tau,    keep_i = sum over patterns p without i of y_p
    h <- keep_i f_i(h) + (1 - keep_i) h

with l the logits of a group, s a factor, g Gumbel noise, and the gradient of softmax(z) in place of that of y. tau
falls from 4 to 0.1. The loss is that of the outputs against the whole network's (the paper has features and the task
beside it). The whole network is left as it was: a copy is masked, and thrown away.

Letters: M units of a group, P patterns.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from ..core.reporter import Reporter
from ..core.seeds import named_seed
from ..runtime.passthrough import Passthrough, running_instead
from .recovery.config import RecoveryConfig
from .recovery.lessons import Lessons
from .recovery.losses import output_loss
from .recovery.taps import answer, placed
from .recovery.trainable import training_
from .settings import MaskConfig
from .teacher import Teacher
from .units import Unit

FACTOR = 100.0  # s
TEMPERATURES = 4.0, 0.1  # tau, at the start and at the end
SPREAD = 0.01  # standard deviation of the first logits
WEIGHT_RATE = 0.1  # learning rate of the updates over that of the masks
ANSWERS_GB = 1.0  # of the whole network that are kept
Known = MutableMapping[str, dict[str, float]]


@dataclass(frozen=True)
class Group:
    """Units in a row and the choices of what goes of them.

    Args:
        patterns: places in `units` that go.
    """

    units: tuple[Unit, ...]
    patterns: tuple[tuple[int, ...], ...]

    @property
    def name(self) -> str:
        """For journals."""
        return f"masks of {self.units[0].name} to {self.units[-1].name}"

    def kept(self) -> Tensor:
        """(P, M): 1 where a unit stays."""
        rows = [[float(place not in pattern) for place in range(len(self.units))] for pattern in self.patterns]
        return torch.tensor(rows)


@dataclass(frozen=True)
class Masks:
    """What was learned.

    Args:
        removed: modules of the most likely patterns.
        kept: unit -> how likely it stays.
    """

    removed: tuple[str, ...]
    kept: dict[str, float]


def learn_masks(
    teacher: Teacher, groups: Sequence[Group], config: MaskConfig, seed: int, known: Known, reporter: Reporter
) -> Masks:
    """Learn which pattern of every group loses least once the rest is trained.

    Args:
        known: logits of an interrupted run; what is found is added.
    """
    if any(group.name not in known for group in groups):
        for group, values in zip(groups, _learned(teacher, groups, config, seed, reporter), strict=True):
            known[group.name] = {_text(pattern): value for pattern, value in zip(group.patterns, values, strict=True)}
    removed: list[str] = []
    kept: dict[str, float] = {}
    for group in groups:
        logits = torch.tensor([known[group.name][_text(pattern)] for pattern in group.patterns])
        pattern = group.patterns[int(logits.argmax())]
        removed += [name for place in pattern for name in group.units[place].modules]
        likely = torch.softmax(FACTOR * logits, 0) @ group.kept()
        kept |= {unit.name: value for unit, value in zip(group.units, likely.tolist(), strict=True)}
    return Masks(tuple(removed), kept)


def _learned(
    teacher: Teacher, groups: Sequence[Group], config: MaskConfig, seed: int, reporter: Reporter
) -> list[list[float]]:
    """The logits (P,) of every group."""
    student = copy.deepcopy(teacher.denoiser).eval()
    device = next(student.parameters()).device
    draw = torch.Generator().manual_seed(named_seed(seed, "masks"))
    logits = [nn.Parameter(SPREAD * torch.randn(len(group.patterns), generator=draw)) for group in groups]
    lessons = Lessons(teacher.calls, partial(answer, teacher.denoiser), ANSWERS_GB, seed)
    low_rank = RecoveryConfig(trainable="lora", rank=config.mask_rank, alpha=2.0 * config.mask_rank)
    losses: list[float] = []

    def title() -> str:
        late = losses[-len(lessons) :]
        return f"learning masks: {sum(late) / len(late):.4f}" if late else "learning masks"

    with training_(student, low_rank, draw) as parameters:
        rate = config.mask_learning_rate
        optimizer = torch.optim.AdamW(
            [
                {"params": logits, "lr": rate, "weight_decay": 0.0},
                {"params": list(parameters.values()), "lr": WEIGHT_RATE * rate, "weight_decay": 0.0},
            ]
        )
        for update in reporter.progress(range(config.mask_updates), title):
            temperature = _temperature(update / max(1, config.mask_updates - 1))
            number = lessons.draw(update)
            with torch.enable_grad():
                gates: dict[str, Tensor] = {}
                for group, own in zip(groups, logits, strict=True):
                    keep = (straight_through(own, temperature, draw) @ group.kept()).to(device)
                    gates |= {name: keep[at] for at, unit in enumerate(group.units) for name in unit.modules}
                with masked(student, gates):
                    given = answer(student, placed(lessons.call(number), student)).output
                loss = output_loss(given, lessons.answer(number).output)
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return [one.tolist() for one in logits]


def straight_through(logits: Tensor, temperature: float, draw: torch.Generator) -> Tensor:
    """(P,) one pattern drawn, as a one-hot row that has the gradient of the relaxed draw."""
    uniform = torch.rand(logits.shape, generator=draw).clamp(min=1e-9, max=1 - 1e-7)
    relaxed = torch.softmax((FACTOR * logits - torch.log(-torch.log(uniform))) / temperature, 0)
    hard = one_hot(relaxed.argmax(), len(logits)).to(relaxed.dtype)
    return hard + relaxed - relaxed.detach()


@contextmanager
def masked(model: nn.Module, gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Run a model with modules that count in part: 1 is the module, 0 as if it were removed."""
    modules = [(model.get_submodule(name), gate) for name, gate in gates.items()]
    forwards = {
        module: partial(_mixed, module.forward, Passthrough.like(module).forward, gate) for module, gate in modules
    }
    with running_instead(forwards):
        yield


def _mixed(run: Any, skip: Any, gate: Tensor, *args: Any, **kwargs: Any) -> Any:
    given, passed = run(*args, **kwargs), skip(*args, **kwargs)
    if isinstance(given, Tensor):
        return gate * given + (1 - gate) * passed
    return tuple(gate * one + (1 - gate) * other for one, other in zip(given, passed, strict=True))


def _temperature(share: float) -> float:
    first, last = TEMPERATURES
    return first + share * (last - first)


def _text(pattern: tuple[int, ...]) -> str:
    return ",".join(map(str, pattern))
