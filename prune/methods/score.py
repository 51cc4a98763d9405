"""One-shot scores and an exact choice, after LAPTOP-Diff (Zhang et al., 2024), arXiv 2404.11098: every unit is skipped
alone, its score s is what the outputs lose, and the units to remove solve

    minimise  sum of s    so that    sum of c >= ratio * C

with c the parameters of a unit and C those of the denoiser, or the time that they take. This relies on scores that add
up. Where the outputs lose more than 1.5 times the sum, units are removed one after the other instead, scored anew each
time, and the better of both sets is kept.
"""

from __future__ import annotations

from ...core.errors import ConfigError
from ..request import Request
from ..select import cheapest, largest
from ..settings import ScoredConfig, parse_groups


class ScoreConfig(ScoredConfig):
    """Fields of `--set`."""


CONFIG = ScoreConfig
NEEDS = ("scores",)
NEEDS_RATIO = True
RESCORES = True  # where scores do not add up


def select(request: Request, config: ScoreConfig) -> tuple[str, ...]:
    """The modules to remove.

    Raises:
        UnsupportedError: the ratio is out of reach.
        ConfigError: groups are asked for where the denoiser has no lists of blocks.
    """
    groups = parse_groups(config.groups) if config.groups else None
    if groups and request.class_name.startswith("UNet") and config.units != "depth":
        raise ConfigError("--set groups is for lists of blocks; a U-Net has pairs of layers.", mend="Leave it out.")
    items = request.items({name: found.score for name, found in request.scores.items()})
    rules = request.rules(groups)
    places = cheapest(items, request.needed(), rules)
    if places is None:
        raise request.out_of_reach(largest(items, rules), config.by)
    return tuple(name for place in places for name in request.units[place].modules)
