"""Taps pair outputs of equal shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dacc.prune.taps import taps_of
from dacc.prune.units import sizes_of
from dacc.runtime.passthrough import main_stream

from . import toys
from .test_remove import CASES, cut


def outputs(toy: toys.Toy, network: nn.Module, names: list[str]) -> list[torch.Size]:
    found: dict[str, torch.Size] = {}

    def keep(name: str) -> Any:
        return lambda module, _, output: found.update({name: main_stream(module, output).shape})

    handles = [network.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    toy.run(network)
    for handle in handles:
        handle.remove()
    return [found[name] for name in names]


def test_blocks_are_paired_with_what_the_next_one_reads():
    toy, removed, _ = CASES["flux"]
    network = toy.build()
    _, removal = cut(network, removed)
    assert taps_of(type(network).__name__, sizes_of(network), removal) == [
        ("transformer_blocks.0", "transformer_blocks.1"),
        ("transformer_blocks.1", "transformer_blocks.2"),
        ("single_transformer_blocks.0", "single_transformer_blocks.1"),
        ("single_transformer_blocks.1", "single_transformer_blocks.3"),
    ]


@pytest.mark.parametrize("name", ["condition: middle", "condition: innermost stage", "motion", "hunyuan dit"])
def test_tapped_outputs_have_equal_shapes(name):
    toy, removed, _ = CASES[name]
    network = toy.build()
    small, removal = cut(network, removed)
    taps = taps_of(type(network).__name__, sizes_of(network), removal)
    assert len(taps) >= 2
    mine, theirs = (list(names) for names in zip(*taps, strict=True))
    assert outputs(toy, small, mine) == outputs(toy, network, theirs)
