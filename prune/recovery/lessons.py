"""What the student is shown, and what the teacher answers to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ...calibrate.held_out import HELD_OUT, split_calls
from ...core.seeds import named_seed
from ...runtime.trajectory import DenoiserCall
from .losses import output_loss
from .taps import Answer, answer, placed

GIGABYTE = 1e9
WHOLE_RUNS = 4  # from so many runs on, whole ones are kept from training
JUDGED = 16  # calls at most that judge


def split_lessons(calls: Iterable[DenoiserCall]) -> tuple[list[DenoiserCall], list[DenoiserCall]]:
    """Calls to learn from, and calls to judge by: every tenth run, samples that are never learned from at any step.

    A set of few runs keeps single calls back instead.

    Raises:
        CalibrationError: fewer than two calls.
    """
    every = list(calls)
    runs = list(dict.fromkeys(call.state.run for call in every if call.state))
    if len(runs) < WHOLE_RUNS or any(call.state is None for call in every):
        return split_calls(every, [call.state.call if call.state else 0 for call in every])
    held_out = set(runs[min(HELD_OUT // 2, len(runs) - 1) :: HELD_OUT])
    learned = [call for call in every if call.state and call.state.run not in held_out]
    return learned, [call for call in every if call.state and call.state.run in held_out]


class Lessons:
    """Calls, drawn anew in every round over them, and the teacher's answers, kept in 16 bits while there is room.

    Answers are rounded to 16 bits whether they are kept or not, so that room changes no result.

    Args:
        ask: evaluates the teacher.
        cache_gb: room for answers; 0: none are kept, and none are rounded.
    """

    def __init__(
        self, calls: Sequence[DenoiserCall], ask: Callable[[DenoiserCall], Answer], cache_gb: float, seed: int
    ) -> None:
        self._calls, self._ask, self._seed = calls, ask, seed
        self._room = cache_gb * GIGABYTE
        self._rounded, self._kept = cache_gb > 0, dict[int, Answer]()

    def __len__(self) -> int:
        return len(self._calls)

    def draw(self, number: int) -> int:
        """Which call comes at some place of the training."""
        turn, place = divmod(number, len(self._calls))
        generator = torch.Generator().manual_seed(named_seed(self._seed, f"round {turn}"))
        return int(torch.randperm(len(self._calls), generator=generator)[place])

    def call(self, index: int) -> DenoiserCall:
        """The call itself."""
        return self._calls[index]

    @torch.no_grad()
    def answer(self, index: int) -> Answer:
        """What the teacher gives in this call."""
        if index in self._kept:
            return self._kept[index]
        found = self._ask(self._calls[index])
        if not self._rounded:
            return found
        found = Answer(
            found.output.bfloat16(), [tuple(part.bfloat16() for part in feature) for feature in found.features]
        )
        size = sum(part.nbytes for part in (found.output, *(part for feature in found.features for part in feature)))
        if size <= self._room:
            self._kept[index] = found
            self._room -= size
        return found


def spread(calls: Sequence[DenoiserCall], count: int, seed: int) -> list[DenoiserCall]:
    """At most `count` calls: sorted by guidance branch and noise level, and one drawn from each of so many equal parts.

    Every n-th call of a set may well be of one branch, or of one noise level.
    """
    ordered = sorted(calls, key=lambda call: (call.state.evaluation, call.state.call) if call.state else (0, 0))
    count = min(count, len(ordered))
    bounds = [len(ordered) * part // count for part in range(count + 1)]
    generator = torch.Generator().manual_seed(named_seed(seed, "judge"))
    return [ordered[int(torch.randint(low, high, (), generator=generator))] for low, high in pairwise(bounds)]


class Judge:
    """Calls that are not trained on, with what the teacher answers, in full precision."""

    @torch.no_grad()
    def __init__(self, calls: Sequence[DenoiserCall], teacher: nn.Module, seed: int) -> None:
        self._calls = spread(calls, JUDGED, seed)
        self._wanted: list[Tensor] = [answer(teacher, placed(call, teacher)).output for call in self._calls]

    @torch.no_grad()
    def error(self, student: nn.Module) -> float:
        """||e - e^||^2 / ||e||^2, mean over calls."""
        errors = [
            float(output_loss(answer(student, placed(call, student)).output, wanted))
            for call, wanted in zip(self._calls, self._wanted, strict=True)
        ]
        return sum(errors) / len(errors)
