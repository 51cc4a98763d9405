"""Shallow layers go, deep ones stay, after VDMini (Individual Content and Motion Dynamics Preserved Pruning for Video
Diffusion Models, Wu et al., 2024), arXiv 2411.18375: deep layers carry the motion of a whole clip, shallow ones the
content of its frames.

The paper says which kind of layers goes from a U-Net (the second pair of residual layer and attention of stages, and
the middle block) and that about 40 % of the parameters do. What is here is our reconstruction of it:

- U-Net: the middle block goes, and all but the first pair of the shallowest stages, as many of them as the ratio needs;
  without a ratio of all stages but the deepest. On Stable Video Diffusion that is [1, 1, 1, 2] layers and 38.8 % fewer
  parameters. With `deep` the deepest stages lose pairs instead, without a ratio as many as come nearest to that size:
  the experiment that should do worse on motion.
- Transformers: by scores of content and motion, the last third of each list of blocks protected, at most a fifth of the
  parameters.
"""

from __future__ import annotations

from pydantic import field_validator

from ...core.errors import ConfigError, UnsupportedError
from ..config import KEPT_PROMISE
from ..request import Request
from ..select import of_each_cost
from ..settings import ScoredConfig
from ..stacks import UNETS
from ..units import Unit

DEEP_SHARE = 3  # the last one in so many blocks of a transformer stays
MOST = 0.2  # of the parameters of a transformer


class VdMiniConfig(ScoredConfig):
    """Fields of `--set`."""

    deep: bool = False  # of U-Nets: the deepest stages lose layers in place of the shallowest, for comparison

    @field_validator("groups", "units")
    @classmethod
    def _check_choice(cls, value: str | None) -> str | None:
        if value not in (None, "auto", "layer"):
            raise ValueError("which layers and blocks go is what vdmini is about; --method score takes it")
        return value


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
    if config.by != "parameters":
        raise ConfigError(
            f"--set by={config.by} is for transformers: of a U-Net no times are taken.", mend="Leave it out."
        )
    if "score" in config.model_fields_set:
        raise ConfigError("--set score is for transformers: a U-Net loses a fixed pattern.", mend="Leave it out.")
    found = _patterns(request, deep=config.deep)
    if not found:
        raise UnsupportedError(
            f"every stage of this {request.class_name} has one layer alone: there is no shallow pair to remove.",
            mend="Use --method score.",
        )
    if request.ratio is None:
        usual = _patterns(request, deep=False)[max(len(found) - 2, 0)]
        return min(found, key=lambda names: abs(_size(request, names) - _size(request, usual)))
    for names in found:
        if _size(request, names) >= KEPT_PROMISE * request.ratio * request.total:
            return names
    raise request.out_of_reach(_size(request, found[-1]), takes_neighbours=True)


def _patterns(request: Request, *, deep: bool) -> list[tuple[str, ...]]:
    """The middle with the pairs of one stage, of two, and so on."""
    stages = sorted({unit.stack for unit in request.units if unit.stack != "mid"}, reverse=deep)
    names = tuple(name for unit in request.units if unit.stack == "mid" for name in unit.modules)
    found: list[tuple[str, ...]] = []
    for stage in stages:
        names += tuple(name for unit in request.units if unit.stack == stage for name in unit.modules)
        found.append(names)
    return found


def _size(request: Request, names: tuple[str, ...]) -> int:
    return sum(request.sizes[name] for name in names)


def _of_transformer(request: Request, config: VdMiniConfig) -> tuple[str, ...]:
    units = [unit for unit in request.units if _is_shallow(unit, request.modules.size(unit.stack))]
    items = request.with_units(units).items({name: found.score for name, found in request.scores.items()})
    sets = of_each_cost(items, int(MOST * request.total), request.rules())
    reach = max(sets)
    needed = request.needed() if request.ratio is not None else max(1, round(KEPT_PROMISE * reach))
    if reach < needed:
        nearest = int(1e4 * reach / request.total) / 1e4
        raise UnsupportedError(
            f"--method vdmini removes at most {MOST:g} of the {config.by} of a transformer, in whole blocks, and none "
            f"of the last third: of this {request.class_name} {nearest:g}.",
            mend=(f"Ask for --ratio {nearest:g} or less, or use" if nearest else "Use") + " --method score.",
        )
    places = min(
        (places for cost, places in sets.items() if cost >= needed),
        key=lambda places: sum(items[place].score for place in places),
    )
    return tuple(name for place in places for name in units[place].modules)


def _is_shallow(unit: Unit, count: int) -> bool:
    """Whether none of its blocks is among the last third."""
    return all(int(name.rpartition(".")[2]) < count - count // DEEP_SHARE for name in unit.modules)
