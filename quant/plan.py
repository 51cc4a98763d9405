"""Decide, before any weight is read, what happens to each layer: its scheme, or the reason to leave it alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import gcd, prod
from typing import Any

from torch import Tensor, nn

from ..core.config import nearest
from ..core.errors import ConfigError, UnsupportedError
from ..core.families import Family, Role
from ..core.pipeline import walk_layers
from ..core.scheme import NVFP4_GROUP, Scheme
from ..runtime.layers import LAYER_CLASSES
from ..runtime.quantized_layer import can_be_smoothed
from .config import FAST_BITS, FIXED_MODES, QuantizeConfig
from .splits import find_splits

AUTO_GROUP = 64  # input features per scale for narrow weights; halved until it divides a layer's features
SMALLEST_GROUP = 16
GROUPED_BITS = 5  # up to here one scale per channel costs too much quality
TEMPORAL_BITS = 8
MODULATION_BITS = 4
SPARED_BITS = 8
BODY = ("body", "text")  # roles that take the bits that were asked for


@dataclass(frozen=True)
class LayerPlan:
    """One layer: `scheme` or, when it is None, `reason`."""

    name: str
    shape: tuple[int, ...]
    scheme: Scheme | None
    reason: str | None = None


@dataclass(frozen=True)
class Traits:
    """What a method is made for, beyond the weights of the body."""

    temporal: bool = False  # embedders and modulation take the asked bits as well
    temporal_acts: bool = False  # and their activations are quantized
    spares: bool = False  # the few layers that suffer most have at least 8 bits, weights and activations
    split: bool = False  # layers that read two joined tensors have scales for each
    calls: int = 1  # length of the grid, for scales of every step
    # linears of the body have smoothing, and a branch of this rank; what reads text as well, but its inputs stay float
    rank: int | None = None
    smooth: bool = False  # so have convolutions whose activation scales are found at each call, without a branch


def plan_layers(
    model: nn.Module, family: Family, config: QuantizeConfig, traits: Traits | None = None
) -> list[LayerPlan]:
    """The plan for every linear, convolution and embedding of a denoiser (which may live on the meta device).

    Raises:
        ConfigError: a glob matches nothing, or an explicit group size does not divide a layer's features.
        UnsupportedError: nothing is left to quantize.
    """
    layers = list(walk_layers(model))
    _check_globs([name for name, _ in layers], config)
    uses = Counter(id(layer.weight) for _, layer in layers)
    kept = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    traits = traits or Traits()
    splits = find_splits(model) if traits.split else {}
    plans = []
    for name, layer in layers:
        shape = _shape(layer)
        reason = _reason_to_skip(name, layer, family, config, kept, shared=uses[id(layer.weight)] > 1)
        scheme = None if reason else _scheme(name, layer, family, config, traits, splits.get(name))
        plans.append(LayerPlan(name, shape, scheme, reason))
    if all(plan.scheme is None for plan in plans):
        raise UnsupportedError(
            f"{type(model).__name__} has no layer left to quantize.", mend="Widen --include or drop an --exclude."
        )
    return plans


def _shape(layer: nn.Module) -> tuple[int, ...]:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return tuple(weight.shape)


def _check_globs(names: list[str], config: QuantizeConfig) -> None:
    for glob in (*config.include, *config.exclude, *_globs(config)):
        if not any(fnmatchcase(name, glob) for name in names):
            raise ConfigError(f"the pattern {glob!r} matches no layer.", mend=nearest(glob, names))


def _globs(config: QuantizeConfig) -> list[str]:
    return [glob for glob, _ in (*config.layer_bits, *config.layer_act_bits)]


def _reason_to_skip(
    name: str, layer: nn.Module, family: Family, config: QuantizeConfig, kept: tuple[str, ...], *, shared: bool
) -> str | None:
    asked = _asked_bits(name, config.layer_bits)
    if type(layer) not in LAYER_CLASSES:
        return f"{type(layer).__name__} is not a plain layer"
    if shared:
        return "shares its weight with another layer"
    if any(fnmatchcase(name, glob) for glob in config.exclude):
        return "excluded"
    if config.include and not any(fnmatchcase(name, glob) for glob in config.include):
        return "not included"
    if asked == 16:
        return "kept at 16 bits as asked"
    if any(part in name.split(".") for part in kept):
        return "the model keeps it in float32"
    if family.role(name) == "edge" and asked is None:
        return "first and last layers stay 16-bit float"
    return None


def _asked_bits(name: str, asked: tuple[tuple[str, int], ...]) -> int | None:
    """Bits that patterns ask for this layer; the last matching one wins."""
    return next((bits for glob, bits in reversed(asked) if fnmatchcase(name, glob)), None)


def _scheme(
    name: str, layer: nn.Module, family: Family, config: QuantizeConfig, traits: Traits, split: int | None
) -> Scheme:
    """How the layer is stored, and what is beside its integers."""
    scheme = _integers(name, layer, family, config, traits, split)
    if traits.smooth and isinstance(layer, nn.Conv2d) and scheme.finds_acts and can_be_smoothed(layer):
        return scheme.model_copy(update={"smooth": True})
    if traits.rank is None or family.role(name) not in BODY or not isinstance(layer, nn.Linear):
        return scheme
    return scheme.model_copy(update={"smooth": True, "rank": min(traits.rank, *_shape(layer)) or None})


def _integers(
    name: str, layer: nn.Module, family: Family, config: QuantizeConfig, traits: Traits, split: int | None
) -> Scheme:
    """Roles decide how far down a layer may go and whether its activations are quantized."""
    role, asked = family.role(name), _asked_bits(name, config.layer_bits)
    spared = traits.spares and family.is_sensitive(name)
    if isinstance(layer, nn.Embedding):
        return Scheme(bits=asked or 8)
    floor = 0 if traits.temporal else {"temporal": TEMPORAL_BITS, "modulation": MODULATION_BITS}.get(role, 0)
    floor = max(floor, SPARED_BITS) if spared else floor
    bits = asked or max(config.bits, floor)
    rounded = (role in BODY or traits.temporal_acts) and isinstance(layer, nn.Linear | nn.Conv2d)
    act_bits = _act_bits(name, role, config, traits, spared=spared) if rounded else 16
    if config.format == "nvfp4" and bits == 4 and isinstance(layer, nn.Linear) and not layer.in_features % NVFP4_GROUP:
        return Scheme(format="nvfp4", bits=bits, group_size=NVFP4_GROUP)
    lifted = asked is None and bits > config.bits
    group_size = _group_size(name, _shape(layer), bits, act_bits, config, lifted=lifted, split=split)
    if act_bits < 16:
        mode = _act_mode(role, config, traits)
        acts: dict[str, Any] = {"act_bits": act_bits, "act_mode": mode}
        if mode == "per-group" and (act_group_size := _act_group_size(layer, group_size, config, split)):
            split = split if group_size is None else None  # groups have scales of their own anyway
            acts |= {"act_group_size": act_group_size, "act_offset": _has_offset(mode, act_bits, config)}
            return Scheme(bits=bits, group_size=group_size, split=split, **acts)
        if mode in ("dynamic", "per-group"):
            acts |= {"act_mode": "dynamic", "act_offset": _has_offset("dynamic", act_bits, config)}
        if mode == "per-step":
            acts["act_steps"] = traits.calls
        return Scheme(bits=bits, group_size=group_size, two_level=group_size is not None, split=split, **acts)
    symmetric = group_size is None if config.symmetric == "auto" else config.symmetric
    return Scheme(bits=bits, symmetric=symmetric, group_size=group_size, split=split if group_size is None else None)


def _has_offset(mode: str, act_bits: int, config: QuantizeConfig) -> bool:
    """Whether scales that are found at each call come with zero points."""
    if config.act_symmetric == "auto":
        return mode == "dynamic" or act_bits >= FAST_BITS
    return not config.act_symmetric


def _act_mode(role: Role, config: QuantizeConfig, traits: Traits) -> str:
    if config.act_mode == "auto" or (role == "text" and config.act_mode in FIXED_MODES):
        return "dynamic"
    return "static" if traits.temporal_acts and role == "body" else config.act_mode


def _act_bits(name: str, role: Role, config: QuantizeConfig, traits: Traits, *, spared: bool) -> int:
    if asked := _asked_bits(name, config.layer_act_bits):
        return asked
    if role == "text" and traits.rank is not None:
        return 16
    return max(config.act_bits, SPARED_BITS if spared else 0)


def _group_size(
    name: str,
    shape: tuple[int, ...],
    bits: int,
    act_bits: int,
    config: QuantizeConfig,
    *,
    lifted: bool,
    split: int | None,
) -> int | None:
    """Values per scale, None for one scale per channel."""
    features, wanted = prod(shape[1:]), config.group_size
    whole = gcd(features, split) if split else features  # groups must not reach over the split
    if wanted == "channel" or (act_bits < 16 and bits > 4):
        return None
    if wanted == "auto":
        return None if bits > GROUPED_BITS else _auto_group(features, whole)
    if lifted:  # a layer that has more bits for its role does not follow the asked groups
        return None
    if features % wanted:
        raise ConfigError(
            f"group_size {wanted} does not divide the {features} input features of {name}.",
            "Groups must be equal.",
            f"Use --group-size auto, or --exclude '{name}'.",
        )
    return None if wanted == features or whole % wanted else wanted


def _auto_group(features: int, whole: int) -> int | None:
    """The largest group that divides `whole`, None where it would be all features or too small."""
    size = AUTO_GROUP
    while whole % size and size > SMALLEST_GROUP:
        size //= 2
    return size if whole % size == 0 and features > size else None


def _act_group_size(layer: nn.Module, group_size: int | None, config: QuantizeConfig, split: int | None) -> int | None:
    """Input features of a linear per activation scale: the groups of its weight, where that has some. None: all of a
    token have the same."""
    if not isinstance(layer, nn.Linear):
        return None
    if group_size is not None:
        return group_size
    features, wanted = layer.in_features, config.group_size
    whole = gcd(features, split) if split else features
    if isinstance(wanted, str):
        return _auto_group(features, whole)
    return wanted if whole % wanted == 0 and features > wanted else None


def without_groups(plans: list[LayerPlan], config: QuantizeConfig) -> list[str]:
    """Linears that were to have activation scales per group, and have one per token because no group divides their
    input features."""
    if config.act_mode != "per-group":
        return []
    size = SMALLEST_GROUP if isinstance(config.group_size, str) else config.group_size
    linears = [plan for plan in plans if plan.scheme and plan.scheme.act_mode == "dynamic" and len(plan.shape) == 2]
    return [plan.name for plan in linears if gcd(plan.shape[1], plan.scheme.split or 0) % size]  # type: ignore[union-attr]


def ungrouped(plans: list[LayerPlan], config: QuantizeConfig) -> list[str]:
    """Layers whose weights were to have groups and have one scale per channel, or for each of the two tensors that they
    read joined: no group divides their input features."""
    if config.group_size == "channel":
        return []
    return [plan.name for plan in plans if plan.scheme and _lacks_groups(plan.shape, plan.scheme, config)]


def _lacks_groups(shape: tuple[int, ...], scheme: Scheme, config: QuantizeConfig) -> bool:
    features, wanted = prod(shape[1:]), config.group_size
    whole = gcd(features, scheme.split or 0)
    if scheme.group_size is not None or (scheme.act_bits < 16 and scheme.bits > 4):
        return False
    if isinstance(wanted, int):  # without a split it was refused
        return scheme.split is not None and scheme.bits <= config.bits and features > wanted and whole % wanted > 0
    return scheme.bits <= GROUPED_BITS and features > SMALLEST_GROUP and whole % SMALLEST_GROUP > 0


def integers_instead(plans: list[LayerPlan], config: QuantizeConfig) -> list[str]:
    """Layers of 4 bits that cannot have the floats that were asked for."""
    if config.format == "integer":
        return []
    return [plan.name for plan in plans if plan.scheme and plan.scheme.bits == 4 and plan.scheme.format == "integer"]
