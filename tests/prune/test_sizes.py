"""Published smaller networks come out of published larger ones, parameter by parameter; nothing is materialised."""

from __future__ import annotations

import pytest

from dacc.benchmarks.prune_sizes import ROWS, chosen, left_without, whole
from dacc.prune.remove import plan_removal
from dacc.prune.units import sizes_of

KNOWN = {  # parameters, how exactly they are published, and whether the config alone tells what is left
    "BK-SDM-Base": (579_384_964, 0, True),
    "BK-SDM-Small": (482_346_884, 0, True),
    "BK-SDM-Tiny": (323_384_964, 0, True),
    "KOALA-1B": (1161e6, 5e-4, True),
    "KOALA-700M": (782.8e6, 1e-4, True),
    "Flux-lite": (8.163e9, 2e-4, True),
    "Flux-mini": (3.179e9, 2e-4, True),
    "VDMini": (933e6, 1e-3, False),
}


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_published_network_comes_out_of_a_larger_one(row):
    network = whole(row.source)
    parameters, within, plain = KNOWN[row.name]
    left = left_without(network, row.removed(network))
    assert left.parameters == pytest.approx(parameters, rel=within, abs=0)
    assert left.plain == plain


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "ratio", "layers", "fewer"),
    [
        ({}, None, [1, 1, 1, 2], 0.388),
        ({}, 0.15, [1, 1, 2, 2], 0.189),
        ({}, 0.45, 1, 0.456),
        ({"deep": True}, 0.389, [2, 2, 1, 1], 0.389),
        ({"deep": True}, None, [2, 2, 1, 1], 0.389),
    ],
)
def test_vdmini_of_stable_video_diffusion_is_as_small_as_told(settings, ratio, layers, fewer):
    network = whole("svd")
    removed = chosen(network, "vdmini", ratio, **settings)
    left = left_without(network, removed)
    assert 1 - left.share == pytest.approx(fewer, abs=5e-4)
    assert not left.plain  # the class always builds a middle
    removal = plan_removal(type(network).__name__, network.config, list(sizes_of(network)), removed)
    assert (removal.config["layers_per_block"], removal.identity) == (layers, ("mid_block",))


def test_without_the_middle_the_config_alone_tells_vdmini():
    network = whole("svd")
    left = left_without(network, tuple(name for name in chosen(network, "vdmini") if name != "mid_block"))
    assert (1 - left.share, left.plain) == (pytest.approx(0.267, abs=5e-4), True)
