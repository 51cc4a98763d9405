"""Shallow layers go, deep ones stay, after VDMini (Individual Content and Motion Dynamics Preserved Pruning for Video
Diffusion Models, Wu et al., 2024), arXiv 2411.18375: deep layers carry the motion of a whole clip, shallow ones the
content of its frames.

The paper says which kind of layers goes from a U-Net (the second pair of residual layer and attention of stages, and
the middle block) and that about 40 % of the parameters do. What is here is our reconstruction of it:

- U-Net: the middle block goes, and all but the first pair of the shallowest stages, as many of them as the ratio needs;
  without a ratio of all stages but the deepest. On Stable Video Diffusion that is [1, 1, 1, 2] layers and 38.8 % fewer
  parameters. With `deep` the deepest stages lose pairs instead: the experiment that should do worse on motion.
- Transformers: by scores of content and motion, the last third of each list of blocks protected, at most a fifth of the
  parameters.
"""

from __future__ import annotations

from ...core.errors import ConfigError, UnsupportedError
from ..config import KEPT_PROMISE
from ..request import Request
from ..select import cheapest, largest
from ..settings import ScoredConfig
from ..stacks import UNETS

DEEP_SHARE = 3  # the last one in so many blocks of a transformer stays
MOST = 0.2  # of the parameters of a transformer


class VdMiniConfig(ScoredConfig):
    """Fields of `--set`."""

    deep: bool = False  # of U-Nets: the deepest stages lose layers in place of the shallowest, for comparison


CONFIG = VdMiniConfig
NEEDS = ("scores of transformers",)


def select(request: Request, config: VdMiniConfig) -> tuple[str, ...]:
    """The modules to remove.

    Raises:
        UnsupportedError: the ratio is out of reach.
        ConfigError: a field that is not for this kind of network.
    """
    if request.class_name in UNETS:
        return _of_unet(request, config)
    if config.deep:
        raise ConfigError("--set deep is for U-Nets.", mend="Leave it out.")
    return _of_transformer(request, config)


def _of_unet(request: Request, config: VdMiniConfig) -> tuple[str, ...]:
    stages = sorted({unit.stack for unit in request.units if unit.stack != "mid"}, reverse=config.deep)
    middle = tuple(name for unit in request.units if unit.stack == "mid" for name in unit.modules)
    if not stages:
        raise UnsupportedError(
            f"every stage of this {request.class_name} has one layer alone: there is no shallow pair to remove.",
            mend="Use --method score.",
        )
    found: list[tuple[str, ...]] = []
    names = middle
    for stage in stages:
        names += tuple(name for unit in request.units if unit.stack == stage for name in unit.modules)
        found.append(names)
    if request.ratio is None:
        return found[max(len(found) - 2, 0)]
    for names in found:
        if sum(request.sizes[name] for name in names) >= KEPT_PROMISE * request.ratio * request.total:
            return names
    raise request.out_of_reach(sum(request.sizes[name] for name in found[-1]))


def _of_transformer(request: Request, config: VdMiniConfig) -> tuple[str, ...]:
    if request.ratio is None:
        request = request.with_ratio(MOST)
    assert request.ratio is not None
    if request.ratio > MOST:
        raise UnsupportedError(
            f"--method vdmini removes at most {MOST:g} of a transformer; {request.ratio:g} was asked for.",
            mend=f"Ask for --ratio {MOST:g} or less, or use --method score.",
        )
    counts = {unit.stack: request.modules.size(unit.stack) for unit in request.units}
    units = [unit for unit in request.units if unit.position < counts[unit.stack] - counts[unit.stack] // DEEP_SHARE]
    request = request.with_units(units)
    items = request.items({unit.name: request.scores[unit.name].score for unit in units})
    places = cheapest(items, request.needed(), request.rules())
    if places is None:
        raise request.out_of_reach(largest(items, request.rules()), config.by)
    return tuple(name for place in places for name in units[place].modules)
