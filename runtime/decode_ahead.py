"""Several calls decoded as one batch, after Faster Diffusion: Rethinking the Role of the UNet Encoder in Diffusion
Models (2024), arXiv 2312.09608. A call that reuses the encoder of a UNet does not look at its noisy sample: what it
gives depends on the last computed call, its timestep and its conditions alone. So the up blocks of calls that follow
each other run at once, whatever the solver does between them.

A call takes what was decoded for it only where it comes with the very timestep and conditions that were supposed;
otherwise it is decoded by itself, and so are all later ones of the run.
Letters: N calls in a batch, B rows that a call has by itself, both guidance branches where they are evaluated together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from .cache_hooks import FRAME, Values

Correct = Callable[[str, str, Any], Any]  # (unit, module, kept) -> what a call gives back in its place
SAMPLE, TIMESTEP = "sample", "timestep"  # arguments of every UNet; what else there is are conditions


class DecodeAhead:
    """What one guidance branch of a run has decoded for calls to come.

    Args:
        denoiser: a UNet.
        tell: what to do with the reason why calls are decoded one by one.
    """

    def __init__(self, denoiser: nn.Module, tell: Callable[[str], None]) -> None:
        self._parameters = inspect.signature(type(denoiser).forward)
        self._denoiser, self._tell = denoiser, tell
        self._outputs: dict[int, Any] = {}
        self._supposed: list[Any] = []  # conditions of these outputs
        self._alone = False

    def give_up(self, why: str) -> None:
        """Decode call by call from here on."""
        self._alone = True
        self._outputs.clear()
        self._tell(f"the cache plan decodes several calls at once; this run decodes them one by one: {why}")

    def __call__(
        self,
        values: Values,
        call: int,
        timesteps: Sequence[float],
        corrections: Sequence[Correct | None],
        forward: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """What a call gives.

        Args:
            values: what the encoder gave at the last computed call.
            timesteps: (N,) of this call and of those behind it that reuse these values.
            corrections: (N,), what each of them does to the values.
            forward: the denoiser without us.
        """
        if self._alone:
            return forward(*args, **kwargs)
        given = self._parameters.bind(self._denoiser, *args, **kwargs)
        conditions = tree_leaves({name: own for name, own in given.arguments.items() if name not in (SAMPLE, TIMESTEP)})
        if not _is(given.arguments[TIMESTEP], timesteps[0]):
            self.give_up("its timesteps are not those of the scheduler")
        elif call in self._outputs and not _alike(conditions, self._supposed):
            self.give_up("other inputs than the noisy sample change from call to call")
        elif call not in self._outputs and len(timesteps) > 1:
            self._decode(values, call, timesteps, corrections, forward, given)
            self._supposed = [_copied(own) for own in conditions]
        return self._outputs.pop(call) if call in self._outputs else forward(*args, **kwargs)

    def _decode(
        self,
        values: Values,
        call: int,
        timesteps: Sequence[float],
        corrections: Sequence[Correct | None],
        forward: Callable[..., Any],
        given: inspect.BoundArguments,
    ) -> None:
        """One evaluation for all these calls, the rows of the first call first."""
        frame, count = FRAME.get(), len(timesteps)
        assert frame is not None
        rows = len(given.arguments[SAMPLE])
        inputs = {name: own for name, own in given.arguments.items() if name not in ("self", TIMESTEP)}
        if any(len(leaf) % rows for leaf in tree_leaves(inputs) if _is_batch(leaf)):
            self.give_up("an input has no row for each sample")
            return
        wide = {name: tree_map(lambda leaf: _repeated([leaf] * count), own) for name, own in inputs.items()}
        wide[TIMESTEP] = _timesteps(given.arguments[TIMESTEP], timesteps, rows, given.arguments[SAMPLE].device)
        kept: Values = {}
        for (unit, path), value in values.items():
            each = [value if correct is None else correct(unit, path, value) for correct in corrections]
            kept[unit, path] = tree_map(lambda *leaves: _repeated(leaves), *each)
        token = FRAME.set(replace(frame, values=kept, correct=None))
        try:
            output = forward(**wide)
        finally:
            FRAME.reset(token)
        leaves, form = tree_flatten(output)
        parts = [leaf.chunk(count) if _is_batch(leaf) else [leaf] * count for leaf in leaves]
        own = zip(*parts, strict=True)
        self._outputs = {call + number: tree_unflatten(list(part), form) for number, part in enumerate(own)}


def has_step_scales(denoiser: nn.Module) -> bool:
    """Whether layers have activation scales for each call, so that no two calls can share a batch."""
    return any(getattr(module, "step_table", None) is not None for module in denoiser.modules())


def _is(timestep: Any, wanted: float) -> bool:
    """Whether a denoiser was given this timestep, in whatever type."""
    if not torch.is_tensor(timestep):
        return bool(timestep == wanted)
    return bool((timestep == torch.tensor(wanted, dtype=timestep.dtype, device=timestep.device)).all())


def _timesteps(like: Any, values: Sequence[float], rows: int, device: torch.device) -> Tensor:
    """(N B,), each value as often as a call has rows."""
    number = torch.float64 if isinstance(like, float) else torch.int64  # as the networks take one
    dtype = like.dtype if torch.is_tensor(like) else number
    return torch.tensor(values, dtype=dtype, device=device).repeat_interleave(rows)


def _is_batch(value: Any) -> bool:
    return torch.is_tensor(value) and value.ndim > 0


def _repeated(parts: Sequence[Any]) -> Any:
    return torch.cat(list(parts)) if _is_batch(parts[0]) else parts[0]


def _copied(value: Any) -> Any:
    return value.clone() if torch.is_tensor(value) else value


def _alike(conditions: list[Any], supposed: list[Any]) -> bool:
    return len(conditions) == len(supposed) and all(map(_same, conditions, supposed))


def _same(one: Any, other: Any) -> bool:
    if torch.is_tensor(one) and torch.is_tensor(other):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
