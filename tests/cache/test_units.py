"""What a search treats where nothing is named."""

from __future__ import annotations

import pytest
from torch import nn

from dacc.cache.config import METHODS
from dacc.cache.units import choose_unit, unit_text
from dacc.core.scheme import Scheme
from dacc.runtime.layers import swap_layers_


class Strange(nn.Module):
    """A denoiser whose parts nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)


def text_of(method: str, denoiser: nn.Module, asked: str = "auto") -> str:
    return unit_text(asked, method, METHODS.load(method), denoiser)


def quantized(denoiser: nn.Module, *bits: int) -> nn.Module:
    """A linear for each number of bits."""
    names = (name for name, module in denoiser.named_modules() if type(module) is nn.Linear)
    swap_layers_(denoiser, {name: Scheme(bits=some) for name, some in zip(names, bits, strict=False)})
    return denoiser


@pytest.mark.parametrize("kind", ["unet_pipeline", "dit_pipeline"])
def test_forecasts_are_of_the_output_and_of_a_network_with_few_bits_of_its_body(request, kind):
    pipe = request.getfixturevalue(kind)()
    denoiser = pipe.unet if kind == "unet_pipeline" else pipe.transformer
    assert text_of("taylor", denoiser) == "output"
    assert text_of("taylor", quantized(denoiser, 8)) == "output"
    assert text_of("taylor", quantized(denoiser, 8, 4)) == "body"
    assert text_of("taylor", denoiser, "output") == "output"
    assert [text_of(method, denoiser) for method in ("dp", "encoder")] == ["auto", "encoder"]


def test_a_network_without_a_known_body_is_forecast_as_a_whole():
    assert [text_of("taylor", denoiser) for denoiser in (Strange(), quantized(Strange(), 4))] == ["output", "output"]
    assert choose_unit(Strange(), "output").kind == "output"


def test_the_body_of_a_transformer_is_all_its_blocks(dit_pipeline):
    unit = choose_unit(dit_pipeline().transformer, "body")
    assert (unit.kind, unit.first, unit.end) == ("block_range", 0, 2)
