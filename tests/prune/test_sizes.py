"""Published smaller networks come out of published larger ones, parameter by parameter; nothing is materialised."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch import nn

from dacc.benchmarks.full_size_models import MODELS
from dacc.core.config import build_config
from dacc.prune.config import METHODS
from dacc.prune.remap import sources_of
from dacc.prune.remove import plan_removal
from dacc.prune.request import Request
from dacc.prune.run import smaller
from dacc.prune.unet import Modules
from dacc.prune.units import find_units, sizes_of

DEEP = "transformer_blocks"


def whole(name: str) -> nn.Module:
    with torch.device("meta"):
        if name == "svd":
            return diffusers.UNetSpatioTemporalConditionModel(num_frames=25)  # its defaults are the published ones
        return MODELS[name].build(MODELS[name].published_depth)


def parameters_without(network: nn.Module, removed: tuple[str, ...]) -> tuple[int, bool]:
    """How many are left, and whether the config alone tells it; the names of all tensors are checked."""
    names = list(sizes_of(network))
    removal = plan_removal(type(network).__name__, network.config, names, removed)
    small = smaller(network, removal)
    before, after = network.state_dict(), small.state_dict()
    sources = sources_of(list(before), removal.keep, removal.removed, removal.copies)
    assert {new: before[old].shape for new, old in sources.items()} == {key: part.shape for key, part in after.items()}
    return sum(value.numel() for value in small.parameters()), not removal.identity


def chosen(network: nn.Module, method: str, ratio: float | None = None, **settings: object) -> tuple[str, ...]:
    """What a method that does not look at weights removes."""
    sizes, units = sizes_of(network), find_units(network)
    request = Request(
        type(network).__name__, dict(network.config), Modules(sizes), sizes, units, ratio, False, False, 0,
        {unit.name: unit.parameters for unit in units}, sizes[""], {},
    )  # fmt: skip
    found = METHODS.load(method)
    return found.select(request, build_config(found.CONFIG, **settings))


def koala(network: nn.Module, depth: int) -> tuple[str, ...]:
    """One layer in each stage, and the deepest attentions shortened, that of the middle too."""
    layers = chosen(network, "bksdm", size="base")
    attentions = ("down_blocks.2.attentions.0", "up_blocks.0.attentions.0", "up_blocks.0.attentions.2")
    blocks = [f"{at}.{DEEP}.{place}" for at in (*attentions, "mid_block.attentions.0") for place in range(depth, 10)]
    return (*layers, *blocks)


@pytest.mark.slow
def test_koala_comes_out_of_sdxl():
    network = whole("sdxl")
    assert parameters_without(network, koala(network, 6)) == (pytest.approx(1161e6, rel=5e-4), True)
    without_middle = [name for name in koala(network, 5) if not name.startswith("mid_block")]
    assert parameters_without(network, (*without_middle, "mid_block")) == (pytest.approx(782.8e6, rel=1e-4), True)


@pytest.mark.parametrize(("size", "parameters"), [("base", 579_384_964), ("small", 482_346_884), ("tiny", 323_384_964)])
def test_bk_sdm_comes_out_of_stable_diffusion(size, parameters):
    network = whole("sd15")
    assert parameters_without(network, chosen(network, "bksdm", size=size)) == (parameters, True)


@pytest.mark.slow
@pytest.mark.parametrize(("doubles", "singles", "parameters"), [(8, 38, 8.163e9), (5, 10, 3.179e9)])
def test_smaller_fluxes_come_out_of_flux(doubles, singles, parameters):
    network = whole("flux")
    removed = [f"{DEEP}.{place}" for place in range(1, 20 - doubles)]
    removed += [f"single_transformer_blocks.{place}" for place in range(38 - singles)]
    assert parameters_without(network, tuple(removed)) == (pytest.approx(parameters, rel=2e-4), True)


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
    left, plain = parameters_without(network, removed)
    assert 1 - left / sizes_of(network)[""] == pytest.approx(fewer, abs=5e-4)
    assert not plain  # the class always builds a middle
    removal = plan_removal(type(network).__name__, network.config, list(sizes_of(network)), removed)
    assert (removal.config["layers_per_block"], removal.identity) == (layers, ("mid_block",))


def test_without_the_middle_the_config_alone_tells_vdmini():
    network = whole("svd")
    removed = tuple(name for name in chosen(network, "vdmini") if name != "mid_block")
    left, plain = parameters_without(network, removed)
    assert (1 - left / sizes_of(network)[""], plain) == (pytest.approx(0.267, abs=5e-4), True)
