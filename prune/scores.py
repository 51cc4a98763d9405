"""One-shot scores of units: how much the network would miss each. Larger is missed more.

- `out_mse`: squared error of the network's outputs without the unit over their square (the criterion of LAPTOP-Diff,
  2024, arXiv 2404.11098). Of videos content and motion are told apart, see `of_outputs`.
- `bi`: 1 - cos of what enters and what leaves the unit, averaged over tokens (block influence of ShortGPT, 2024, arXiv
  2403.03853).
- `inout_mse`: squared change of what passes through the unit over its square.
- `taylor`: |sum of w dL/dw| over the unit's weights, L the loss against noise that was added, summed over noise levels
  (Diff-Pruning, Fang et al., 2023, arXiv 2305.10924); see `task.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from ..core.reporter import Reporter
from ..runtime.passthrough import entering, main_stream
from .task import task_gradients
from .teacher import Teacher
from .units import Unit

MOTION_WEIGHT = 2.0  # kappa
TASK_LEVELS = 0.05  # noise levels whose loss is below this share of the largest are left out of `taylor`
Known = MutableMapping[str, dict[str, float]]  # what is known of single units already, for runs that go on


@dataclass(frozen=True)
class UnitScore:
    """What is known of one unit."""

    score: float
    content: float | None = None
    motion: float | None = None


def score_units(
    name: str, teacher: Teacher, units: Sequence[Unit], known: Known, seed: int, reporter: Reporter
) -> dict[str, UnitScore]:
    """Unit -> its score by one of `SCORES`."""
    return SCORES[name](teacher, units, known, seed, reporter)


def of_outputs(errors: Mapping[str, float], alone: Sequence[Mapping[str, float]]) -> float:
    """What the outputs lose as one number. Of videos errors of frames and of their differences, each over its median,
    motion counted twice.

    Args:
        errors: fields of `Errors`, of one unit or of several together.
        alone: those of each unit by itself.
    """
    if errors["content"] is None:
        return errors["relative"]
    content, motion = (errors[part] / (median(one[part] for one in alone) or 1.0) for part in ("content", "motion"))
    return content + MOTION_WEIGHT * motion


def _out_mse(
    teacher: Teacher, units: Sequence[Unit], known: Known, seed: int, reporter: Reporter
) -> dict[str, UnitScore]:
    for unit in reporter.progress(units, "scoring"):
        if unit.name not in known:
            known[unit.name] = asdict(teacher.errors(unit.modules))
    found = {unit.name: known[unit.name] for unit in units}
    alone = list(found.values())
    return {
        name: UnitScore(of_outputs(errors, alone), errors["content"], errors["motion"])
        for name, errors in found.items()
    }


def _from_sites(change: Callable[[Tensor, Tensor], float]) -> Callable[..., dict[str, UnitScore]]:
    """A score from what enters and leaves a unit, in one pass over the calls."""

    def score(
        teacher: Teacher, units: Sequence[Unit], known: Known, seed: int, reporter: Reporter
    ) -> dict[str, UnitScore]:
        sites = {site for unit in units for site in unit.sites}
        totals = dict.fromkeys(sites, 0.0)
        for call in reporter.progress(teacher.calls, "scoring"):
            for site, (before, after) in _watch(teacher.denoiser, sites, call.replay).items():
                totals[site] += change(before, after) / len(teacher.calls)
        return {unit.name: UnitScore(sum(totals[site] for site in unit.sites)) for unit in units}

    return score


def _watch(
    denoiser: nn.Module, sites: set[tuple[str, str]], run: Callable[[nn.Module], Any]
) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """What enters and what leaves every site in one run of the network."""
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}
    handles = []
    for first, last in sites:

        def enter(module: nn.Module, args: Any, kwargs: Any, name: str = first) -> None:
            before[name] = entering(module, args, kwargs).detach().float()

        def leave(module: nn.Module, _: Any, output: Any, name: str = last) -> None:
            after[name] = main_stream(module, output).detach().float()

        handles.append(denoiser.get_submodule(first).register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(denoiser.get_submodule(last).register_forward_hook(leave))
    try:
        run(denoiser)
    finally:
        for handle in handles:
            handle.remove()
    return {(first, last): (before[first], after[last]) for first, last in sites}


def block_influence(before: Tensor, after: Tensor) -> float:
    """1 - cos over channels, averaged over tokens: the last axis of three, the second of more."""
    return 1 - cosine_similarity(before, after, dim=-1 if before.ndim == 3 else 1).mean().item()


def relative_change(before: Tensor, after: Tensor) -> float:
    """Squared change over square."""
    return ((after - before).square().mean() / before.square().mean().clamp(min=1e-30)).item()


def _taylor(
    teacher: Teacher, units: Sequence[Unit], known: Known, seed: int, reporter: Reporter
) -> dict[str, UnitScore]:
    weights = {
        f"{name}.{leaf}": parameter
        for unit in units
        for name in unit.modules
        for leaf, parameter in teacher.denoiser.get_submodule(name).named_parameters()
    }
    levels = task_gradients(teacher, weights, seed, reporter)
    largest = max(loss for loss, _ in levels)
    totals = dict.fromkeys(weights, 0.0)
    for loss, products in levels:
        if loss >= TASK_LEVELS * largest:
            for name, value in products.items():
                totals[name] += value
    return {
        unit.name: UnitScore(abs(sum(value for name, value in totals.items() if _lies_in(name, unit))))
        for unit in units
    }


def _lies_in(name: str, unit: Unit) -> bool:
    return any(name.startswith(f"{module}.") for module in unit.modules)


SCORES: Mapping[str, Callable[..., dict[str, UnitScore]]] = {
    "out_mse": _out_mse,
    "bi": _from_sites(block_influence),
    "inout_mse": _from_sites(relative_change),
    "taylor": _taylor,
}
