"""The hooks that stand before the modules of cached units: they compute, keep and give back as the frame says.

A frame is one evaluation of a denoiser. It lives in a context variable, so threads that share a denoiser do not meet.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from diffusers.hooks._helpers import TransformerBlockMetadata
from diffusers.hooks.hooks import ModelHook
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..core.cache_plan import COMPUTE, FORECAST, REUSE, SKIPPING, BlockRange
from ..core.errors import UnsupportedError
from .block_streams import entering, leaving
from .cache_units import WHOLE
from .clock import RunState
from .forecast import History

Values = dict[tuple[str, str], Any]  # (unit, module) -> its kept or hollow output; of a block range: its change


@dataclass
class Frame:
    """One evaluation of one denoiser."""

    owner: object  # the runner that opened it
    actions: dict[str, str]  # unit -> C, R, F or -; G until its gate has decided
    storing: frozenset[str]  # computed units whose values a later evaluation needs
    values: Values
    history: History = field(default_factory=History)  # earlier values, for forecasts
    state: RunState | None = None  # where the run is; None: by hand
    decide: Callable[[str, float | None], str] | None = None  # (unit, change of what its gate sees) -> action
    entered: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # block range -> the streams that entered it
    correct: Callable[[str, str, Any], Any] | None = None  # (unit, module, kept) -> what is given back in its place
    # (unit, module) -> its forecast by fitted weights; None where they are not for what is there
    fitted: Callable[[str, str], Any] | None = None
    changed: bool = False  # whether the denoiser adds in place to what its blocks give
    ahead: Callable[..., Any] | None = None  # stands before the denoiser: it evaluates later calls too

    def keep(self, unit: str, path: str, value: Any) -> None:
        """Hold on to what a module of a computed unit gave."""
        self.values[unit, path] = value
        if self.state is not None:
            self.history.add((unit, path), self.state, value)

    def known(self, unit: str, path: str) -> Any:
        """What a gate compares with; None where nothing is there yet."""
        if (unit, path) in self.history.predictors and self.history.count((unit, path)) and self.state is not None:
            return self.history.forecast((unit, path), self.state)
        return self.values.get((unit, path))

    def give(self, unit: str, path: str) -> Any:
        """What a module of a skipped unit gives in this call."""
        if self.actions[unit] == FORECAST and self.state is not None:
            found = self.fitted(unit, path) if self.fitted else None
            return self.history.forecast((unit, path), self.state) if found is None else found
        value = self.values[unit, path]
        return value if self.correct is None else self.correct(unit, path, value)


ADDITIONS = ("down_intrablock_additional_residuals", "down_block_additional_residuals")  # of T2I-Adapters, then and now

FRAME: contextvars.ContextVar[Frame | None] = contextvars.ContextVar("dacc_cache_frame", default=None)


class SkipHook(ModelHook):
    """Stands before one module that units skip as a whole.

    Args:
        owner: the runner whose frames count.
        path: name of the module.
        units: the units that skip it -> whether they keep its output.
    """

    def __init__(self, owner: object, path: str, units: dict[str, bool]) -> None:
        super().__init__()
        self.owner, self.path, self.units = owner, path, units

    def new_forward(self, _: nn.Module, *args: Any, **kwargs: Any) -> Any:
        frame = FRAME.get()
        if frame is None or frame.owner is not self.owner:
            return original_of(self)(*args, **kwargs)
        skipping = [unit for unit in self.units if frame.actions[unit] in SKIPPING]
        giving = next((unit for unit in skipping if self.units[unit]), None)
        if giving is not None:
            output = self._lent(frame, frame.give(giving, self.path))
        elif skipping:
            output = self._lent(frame, frame.values[skipping[0], self.path])
        else:
            output = original_of(self)(*args, **kwargs)
        for unit, keeps in self.units.items():  # where an inner one is skipped too: an outer one may compute
            if unit in frame.storing and keeps:
                frame.keep(unit, self.path, self._lent(frame, tree_map(_detached, output)))
            elif unit in frame.storing:
                frame.values[unit, self.path] = tree_map(_hollow, output)
        return output

    def _lent(self, frame: Frame, output: Any) -> Any:
        """An output with a main tensor of its own where the denoiser, or the pipeline around it, may add to it in
        place: what is kept stays as it was."""
        if self.path == WHOLE:
            return tree_map(_cloned, output)
        if not frame.changed:
            return output
        return (output[0].clone(), *output[1:]) if isinstance(output, tuple) else output.clone()


class LayerHook(ModelHook):
    """Corrects what a layer behind a unit gives in the calls that correct what the unit gives back.

    Args:
        owner: the runner whose frames count.
        unit: the unit.
        path: name of the layer.
    """

    def __init__(self, owner: object, unit: str, path: str) -> None:
        super().__init__()
        self.owner, self.unit, self.path = owner, unit, path

    def new_forward(self, _: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = original_of(self)(*args, **kwargs)
        frame = FRAME.get()
        if frame is None or frame.owner is not self.owner or frame.correct is None:
            return output
        return frame.correct(self.unit, self.path, output) if frame.actions[self.unit] == REUSE else output


class BlockHook(ModelHook):
    """Stands before one block of a range: passes what enters it through where the range is skipped, and gives at its
    last block what entered the first one plus what the range changed.

    That change holds what a model adds between blocks, as for a ControlNet; what reaches the last one does not count.

    Args:
        owner: the runner whose frames count.
        unit: the range.
        path: name of the block.
        metadata: the names and places of its streams, image and text.
        first: whether the range begins here.
        last: whether it ends here.
    """

    def __init__(
        self,
        owner: object,
        unit: BlockRange,
        path: str,
        metadata: TransformerBlockMetadata,
        *,
        first: bool,
        last: bool,
    ) -> None:
        super().__init__()
        self.owner, self.unit, self.path, self.metadata = owner, unit, path, metadata
        self.first, self.last = first, last

    def new_forward(self, _: nn.Module, *args: Any, **kwargs: Any) -> Any:
        frame = FRAME.get()
        if frame is None or frame.owner is not self.owner:
            return original_of(self)(*args, **kwargs)
        unit, residual = self.unit.id, self.unit.store == "residual"
        skipping = frame.actions[unit] in SKIPPING
        if self.first and residual and (skipping or unit in frame.storing):
            frame.entered[unit] = entering(self.metadata, args, kwargs)
        if skipping and not self.last:
            return self._output(entering(self.metadata, args, kwargs))
        if skipping:
            kept = frame.give(unit, self.path)
            return self._output(_added(frame.entered.pop(unit), kept) if residual else kept)
        output = original_of(self)(*args, **kwargs)
        if self.last and unit in frame.storing:
            left = leaving(self.metadata, output)
            kept = self._change(frame.entered.pop(unit), left) if residual else tree_map(_detached, left)
            frame.keep(unit, self.path, kept)
        return output

    def _output(self, streams: tuple[Any, Any]) -> Any:
        """The streams in the order in which the block returns them."""
        place = self.metadata.return_encoder_hidden_states_index
        if place is None:
            return streams[0]
        output = [None, None]
        output[self.metadata.return_hidden_states_index], output[place] = streams
        return tuple(output)

    def _change(self, entered: tuple[Any, Any], left: tuple[Any, Any]) -> tuple[Any, Any]:
        for before, after in zip(entered, left, strict=True):
            if before is not None and after is not None and before.shape != after.shape:
                raise UnsupportedError(
                    f"the blocks of {self.unit.id!r} turn {tuple(before.shape)} into {tuple(after.shape)}.",
                    "What a range adds can be kept only where it leaves the shape alone.",
                    "Choose blocks of one list alone.",
                )
        return _difference(left[0], entered[0]), _difference(left[1], entered[1])


def original_of(hook: ModelHook) -> Any:
    """What the module of a hook would run without it."""
    return hook.fn_ref.original_forward


def has_free_u(denoiser: nn.Module) -> bool:
    """Whether the up blocks of a UNet scale what enters them in place (`pipe.enable_freeu`)."""
    blocks = getattr(denoiser, "up_blocks", None) or ()
    return any(getattr(block, "b1", None) is not None for block in blocks)


def drop(values: Values, units: Iterable[str]) -> None:
    """Free the values of some units."""
    units = set(units)
    for key in [key for key in values if key[0] in units]:
        del values[key]


def computing(units: Iterable[str]) -> dict[str, str]:
    """The actions of an evaluation that computes everything."""
    return dict.fromkeys(units, COMPUTE)


def _added(streams: tuple[Any, Any], change: tuple[Any, Any]) -> tuple[Any, Any]:
    """Streams plus what a range adds to them; a stream that ends in the range is not there behind it."""
    image, text = change
    return streams[0] + image, None if text is None else streams[1] + text


def _difference(after: Tensor | None, before: Tensor | None) -> Tensor | None:
    return None if after is None or before is None else (after - before).detach()


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _hollow(value: Any) -> Any:
    """Zeros of the same shape that hold one element."""
    return value.new_zeros(()).expand(value.shape) if isinstance(value, Tensor) else value
