"""Modules that pass on what enters them: what is left of a block that is gone from a class that always builds it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D, SpatioTemporalResBlock
from torch import Tensor, nn


class Passthrough(nn.Module):
    """Gives back the streams that enter it. It has no weights.

    Args:
        names: parameters of the forward that it stands for, in their order.
        streams: those of them that come back, in their order.
        channels: of what comes back, where more enter, as in the layers of a U-Net that read a skip connection: that is
            appended to what the layer before gives.
    """

    def __init__(self, names: tuple[str, ...], streams: tuple[str, ...], channels: int | None = None) -> None:
        super().__init__()
        self.names, self.streams, self.channels = names, streams, channels

    @classmethod
    def like(cls, module: nn.Module) -> Passthrough:
        """One that can stand in the place of `module`."""
        names = tuple(inspect.signature(type(module).forward).parameters)[1:]
        channels: int | None = None
        if isinstance(module, ResnetBlock2D | ResnetBlockCondNorm2D):
            channels = module.out_channels
        elif isinstance(module, SpatioTemporalResBlock):
            channels = module.spatial_res_block.out_channels
        return cls(names, _streams(module, names), channels)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        found = [given[name] for name in self.streams if given.get(name) is not None]
        if self.channels is not None:
            found = [value[:, : self.channels] for value in found]
        single = len(found) == 1 and given.get("return_dict") is not False
        return found[0] if single else tuple(found)


def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The main stream that enters a module: what it would give back if it were removed."""
    found = Passthrough.like(module)(*args, **kwargs)
    return main_stream(module, found)


def main_stream(module: nn.Module, output: Any) -> Tensor:
    """Of what a module gives: the picture, not the text."""
    if isinstance(output, tuple):
        names = tuple(inspect.signature(type(module).forward).parameters)[1:]
        streams = _streams(module, names)
        value: Tensor = output[streams.index(names[0])] if len(streams) == len(output) else output[0]
        return value
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first


def bypass_(model: nn.Module, names: Collection[str]) -> None:
    """Put passing modules in the places of some of a model's."""
    for name in names:
        model.set_submodule(name, Passthrough.like(model.get_submodule(name)))


@contextmanager
def skipping(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Run a model as if some of its modules were removed; they keep their attributes, which others may read."""
    modules = [model.get_submodule(name) for name in names]
    with running_instead({module: Passthrough.like(module).forward for module in modules}):
        yield


@contextmanager
def running_instead(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Run other functions in the places of the forwards of some modules, which have their own again afterwards."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module, own in before.items():
            if own is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = own


def _streams(module: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """Parameters that a module gives back changed, in the order in which it does."""
    try:
        metadata = TransformerBlockRegistry.get(type(module))
    except ValueError:
        return names[:1]
    place = metadata.return_encoder_hidden_states_index
    if place is None:
        return names[:1]
    return (names[0], "encoder_hidden_states") if place == 1 else ("encoder_hidden_states", names[0])
