"""Which of the arguments and results of a transformer block are its streams of image and text."""

from __future__ import annotations

from typing import Any

from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from torch import nn

from ..core.errors import UnsupportedError

# whose forward takes `hidden_states` first and gives one tensor; diffusers describes these not
ONE_STREAM = {"SanaTransformerBlock", "HunyuanDiTBlock", "StableAudioDiTBlock", "LuminaNextDiTBlock"}
ONE_STREAM |= {"Lumina2TransformerBlock", "AuraFlowSingleTransformerBlock"}


def block_metadata(block: nn.Module) -> TransformerBlockMetadata:
    """Where a transformer block takes and returns its streams.

    Raises:
        UnsupportedError: nobody tells for blocks of this class.
    """
    kind = type(block)
    if kind.__name__ in ONE_STREAM:
        return TransformerBlockMetadata(return_hidden_states_index=0, _cls=kind)
    try:
        return TransformerBlockRegistry.get(kind)
    except ValueError:
        raise UnsupportedError(
            f"blocks of class {kind.__name__} cannot be cached as a range.",
            "It is not known which of their arguments and results belong together.",
            "Cache single modules of this model.",
        ) from None


def is_described(block: nn.Module) -> bool:
    """Whether the streams of a block are known."""
    try:
        block_metadata(block)
    except UnsupportedError:
        return False
    return True


def entering(metadata: TransformerBlockMetadata, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The image and text streams that enter a block; no text where it has no stream of its own."""
    read = metadata._get_parameter_from_args_kwargs
    image = read(metadata.hidden_states_argument_name, args, kwargs)
    if metadata.return_encoder_hidden_states_index is None:
        return image, None
    return image, read(metadata.encoder_hidden_states_argument_name, args, kwargs)


def leaving(metadata: TransformerBlockMetadata, output: Any) -> tuple[Any, Any]:
    """The image and text streams in what a block returns."""
    if not isinstance(output, tuple):
        return output, None
    place = metadata.return_encoder_hidden_states_index
    return output[metadata.return_hidden_states_index], None if place is None else output[place]
