"""What a denoiser answers in a stored call, and what some of its modules give on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ...core.errors import UnsupportedError
from ...runtime.clock import fixed_run
from ...runtime.trajectory import DenoiserCall

Feature = tuple[Tensor, ...]  # what one module gives: one tensor, or one for each stream


@dataclass
class Answer:
    """What a denoiser gives in one call."""

    output: Tensor
    features: list[Feature] = field(default_factory=list)  # in the order of the taps


class LastSeen(Exception):
    """All that was asked for has been seen; the rest of the network need not run."""


@contextmanager
def watched(model: nn.Module, names: Sequence[str], *, stop: bool = False) -> Iterator[dict[str, Feature]]:
    """Keep what modules give, by name.

    Args:
        stop: end the forward pass with `LastSeen` as soon as all have been seen.
    """
    seen: dict[str, Feature] = {}

    def watch(name: str) -> Any:
        def keep(_: nn.Module, inputs: Any, output: Any) -> None:
            seen[name] = _tensors(output)
            if stop and len(seen) == len(set(names)):
                raise LastSeen

        return model.get_submodule(name).register_forward_hook(keep)

    handles = [watch(name) for name in dict.fromkeys(names)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def answer(model: nn.Module, call: DenoiserCall, names: Sequence[str] = ()) -> Answer:
    """Evaluate `model` on a call, with gradients where they are on.

    Args:
        names: modules whose outputs are wanted too.
    """
    with watched(model, names) as seen, fixed_run(call.state):
        output = model(*call.args, **call.kwargs)
    return Answer(output[0], [seen[name] for name in names])


def check_taps(student: Answer, teacher: Answer, taps: Sequence[tuple[str, str]]) -> None:
    """Refuse taps that cannot be compared.

    Raises:
        UnsupportedError: a shape differs.
    """
    pairs: list[tuple[str, Feature, Feature]] = [("the output", (student.output,), (teacher.output,))]
    pairs += [
        (f"{ours} and {theirs}", one, other)
        for (ours, theirs), one, other in zip(taps, student.features, teacher.features, strict=True)
    ]
    for where, one, other in pairs:
        shapes = [[tuple(tensor.shape) for tensor in feature] for feature in (one, other)]
        if shapes[0] != shapes[1] or not shapes[0]:
            raise UnsupportedError(
                f"{where} cannot be compared: {shapes[0]} in the student, {shapes[1]} in the teacher.",
                "Recovery compares equal shapes only.",
            )


def placed(call: DenoiserCall, model: nn.Module) -> DenoiserCall:
    """The call on the device of a model, its large floats in the model's type."""
    weight = next(model.parameters())

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(weight.device, weight.dtype if value.is_floating_point() and value.ndim > 1 else value.dtype)

    args, kwargs, truth = (tree_map(move, part) for part in (call.args, call.kwargs, call.truth))
    return DenoiserCall(call.component, call.state, args, kwargs, truth)


def _tensors(output: Any) -> Feature:
    """The streams of a block; not the skips that a down block lists beside its output."""
    parts = (output,) if isinstance(output, Tensor) else tuple(output)
    return tuple(part for part in parts if isinstance(part, Tensor) and part.is_floating_point() and part.ndim > 1)
