from __future__ import annotations

import pytest
import torch
from torch import nn

from dacc.quant.entry import Watch, watch_entry


def test_what_enters_is_seen_and_replaced_by_place_and_by_name() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    wanted = layer(2 * x)
    seen: list[torch.Tensor] = []
    hook = watch_entry(layer, lambda _, entering: seen.append(entering) or 2 * entering)
    assert torch.equal(layer(x), wanted)
    assert torch.equal(layer(input=x), wanted)
    assert all(torch.equal(one, x) for one in seen)
    hook.remove()
    assert torch.equal(layer(input=2 * x), wanted)
    assert len(seen) == 2


def test_a_look_that_gives_nothing_changes_nothing() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    wanted = layer(x)
    watch_entry(layer, lambda *_: None)
    assert torch.equal(layer(x), wanted)
    assert torch.equal(layer(input=x), wanted)


def test_a_watch_ends_with_its_block_whatever_happens_there() -> None:
    one, other, x = nn.Linear(3, 2), nn.Linear(5, 2), torch.randn(4, 3)
    seen: list[nn.Module] = []
    with pytest.raises(RuntimeError), Watch((layer, lambda it, _: seen.append(it)) for layer in (one, other)):
        nn.Sequential(one, other)(x)
    one(x)
    assert seen == [one, other]
