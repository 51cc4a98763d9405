"""What of the student is trained, and how that becomes ordinary weights again.

full     all weights.
lora     W = W0 + alpha / r * B A for every linear and convolution (Hu et al., 2022, ICLR, arXiv 2106.09685).
difffit  biases, norms, and a factor g for every residual branch (Xie et al., 2023, ICCV, arXiv 2304.06648). The factor
         multiplies weight and bias of the last layer of the branch, g (W x + b) = (g W) x + g b, so it folds into them.

Low-rank updates and factors are parametrizations of the weights: the network always computes with the weights that it
will have in the end, and folding changes no value.
Letters: O output channels, K input features per row, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...core.errors import UnsupportedError
from .config import RecoveryConfig

# the last layer of a residual branch, as diffusers names it; the `?*` in front keeps the output layer of a network out
BRANCH_ENDS = (
    "?*.to_out.0",
    "?*.attn.to_out",  # a list in all but the single-stream blocks of Flux 2
    "?*.to_add_out",
    "?*.ff*.net.2",
    "?*.ff*.linear_out",
    "?*.*_mlp.net.2",
    "?*.conv2",
    "?*.temp_convs.*.conv4.3",
    "?*.proj_out",
    "?*.conv_point",
)
LOW_RANK_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LowRank(nn.Module):
    """W0 + scale * B A, in the shape of W0.

    Args:
        weight: W0, (O, ...) whose other axes have K values.
    """

    def __init__(self, weight: Tensor, rank: int, scale: float | None, generator: torch.Generator) -> None:
        super().__init__()
        rows, features = weight.shape[0], weight[0].numel()
        self.scale = 1.0 if scale is None else scale / rank  # of the rank that was asked for, as everywhere
        rank = min(rank, rows, features)
        start = (2 * torch.rand(rank, features, generator=generator) - 1) / features**0.5
        self.down = nn.Parameter(start.to(weight.device))  # A
        self.up = nn.Parameter(torch.zeros(rows, rank, device=weight.device))  # B

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # what is folded has all its bits
            return weight + self.scale * (self.up @ self.down).view_as(weight)


class Factor(nn.Module):
    """g W: one number for all of a tensor; the same for weight and bias of a layer."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones((), device=device))

    def forward(self, weight: Tensor) -> Tensor:
        return self.factor * weight


@contextmanager
def training_(
    student: nn.Module, config: RecoveryConfig, generator: torch.Generator
) -> Iterator[dict[str, nn.Parameter]]:
    """Make the student trainable; afterwards it has plain weights again, changed by what was learned.

    Args:
        generator: draws what low-rank updates start from.

    Yields:
        What is trained, by name, in a fixed order.

    Raises:
        UnsupportedError: there is nothing to train.
    """
    needed = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    types = {name: parameter.dtype for name, parameter in student.named_parameters()}
    orders = {name: list(module._parameters) for name, module in student.named_modules()}
    try:
        student.float()  # 16 bits are too coarse to add small updates to
        student.requires_grad_(False)
        _PREPARE[config.trainable](student, config, generator)
        yield _trained(student, config)
    finally:
        _fold_(student, orders)
        for name, parameter in student.named_parameters():
            parameter.data = parameter.data.to(types[name])
            parameter.grad = None
            parameter.requires_grad_(needed[name])


def branch_ends(student: nn.Module) -> list[str]:
    """Names of the last layers of residual branches: those that `difffit` gives a factor, which folds into them."""
    return [
        name
        for name, module in student.named_modules()
        if isinstance(module, LOW_RANK_LAYERS) and any(fnmatchcase(name, pattern) for pattern in BRANCH_ENDS)
    ]


def _train_all(student: nn.Module, config: RecoveryConfig, generator: torch.Generator) -> None:
    student.requires_grad_(True)


def _add_low_rank(student: nn.Module, config: RecoveryConfig, generator: torch.Generator) -> None:
    for module in list(student.modules()):
        if isinstance(module, LOW_RANK_LAYERS):
            low_rank = LowRank(module.weight, config.rank, config.alpha, generator)
            parametrize.register_parametrization(module, "weight", low_rank)


def _add_factors(student: nn.Module, config: RecoveryConfig, generator: torch.Generator) -> None:
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[2] == "bias")
    for module in student.modules():
        if "Norm" in type(module).__name__:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)
    for name in branch_ends(student):
        layer = student.get_submodule(name)
        factor = Factor(next(layer.parameters()).device)
        for kind in ("weight", "bias"):
            if getattr(layer, kind) is not None:
                parametrize.register_parametrization(layer, kind, factor)


_PREPARE = {"full": _train_all, "lora": _add_low_rank, "difffit": _add_factors}


def _trained(student: nn.Module, config: RecoveryConfig) -> dict[str, nn.Parameter]:
    found = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    if not found:
        raise UnsupportedError(
            f"{type(student).__name__} has nothing that trainable={config.trainable} trains.",
            mend="Use --set trainable=full.",
        )
    return found


def _fold_(student: nn.Module, orders: dict[str, list[str]]) -> None:
    """Put the weights that the network computes with in the place of what they were made of, in the old order."""
    for name, module in list(student.named_modules()):
        if not parametrize.is_parametrized(module):
            continue
        for kind in list(module.parametrizations):  # type: ignore[union-attr, arg-type]
            parametrize.remove_parametrizations(module, kind, leave_parametrized=True)
        for kind in orders[name]:
            module._parameters[kind] = module._parameters.pop(kind)
