"""The tensors of a smaller network, against those of the files."""

from __future__ import annotations

import pytest
import torch

from dacc.core.errors import ModelError
from dacc.prune.remove import plan_removal
from dacc.prune.run import remapped, smaller

from . import toys

GONE = "blocks.1"


@pytest.fixture
def cut():
    """Takes the tensors of files, gives those of a network without a block."""
    network = toys.wan().build()
    removal = plan_removal(type(network).__name__, network.config, dict(network.named_modules()), [GONE])
    small = smaller(network, removal)
    return network.state_dict(), lambda stored: remapped(stored, small, removal, "transformer of wan")


def test_tensors_that_diffusers_passes_over_are_no_damage(cut):
    stored, remap = cut
    names = {f"blocks.{place}.attn2.norm_added_q.weight": torch.ones(24) for place in range(4)}
    assert set(remap(stored | names)) == set(remap(stored))


def test_what_does_not_fit_is_told_apart(cut):
    stored, remap = cut
    bias = torch.ones(3)
    damaged = stored | {"blocks.3.ffn.net.2.bias": bias, "extra": bias, "other": bias, f"{GONE}.strange": bias}
    del damaged["blocks.0.scale_shift_table"]
    with pytest.raises(ModelError, match="of wan") as refused:
        remap(damaged)
    for told in (
        "blocks.0.scale_shift_table is missing;",
        "extra is left over, and 1 more;",
        "blocks.2.ffn.net.2.bias is of another shape.",
    ):
        assert told in refused.value.what
