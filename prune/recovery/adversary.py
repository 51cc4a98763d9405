"""An adversary that tells the student's clips from the teacher's: the teacher's own first stages, frozen, with small
heads that are trained. Spatial heads look at single frames, temporal ones at one place through all frames (the layout
of SF-V, 2024, arXiv 2406.04324).

Letters: N clips, F frames, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...runtime.trajectory import DenoiserCall
from ..frames import Layout, noisy_sample
from .taps import LastSeen, answer, placed, watched

WIDTH = 64  # channels inside a head
GRADIENT_PENALTY = 1e-4  # of the heads' gradients at real features
STACK_TAPS = (0.25, 0.5)  # of a stack of equal blocks: where a quarter and a half of it is done


class Heads(nn.Module):
    """One spatial and one temporal head for every stage.

    Args:
        channels: C of every stage.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.spatial = nn.ModuleList(_head(nn.Conv2d, width) for width in channels)
        self.temporal = nn.ModuleList(_head(nn.Conv1d, width) for width in channels)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """What each head says at each place: above 0 for the teacher's.

        Args:
            features: (N, F, C, H, W) of every stage.

        Returns:
            Of the spatial heads (N, F, H, W), of the temporal ones (N, H, W, F).
        """
        frames, courses = [], []
        for feature, spatial, temporal in zip(features, self.spatial, self.temporal, strict=True):
            clips, length, channels, height, width = feature.shape
            even = functional.group_norm(feature.flatten(0, 1), 1)  # frame by frame: stages differ much in size
            frames.append(spatial(even).view(clips, length, height, width))
            course = even.view(feature.shape).permute(0, 3, 4, 2, 1).reshape(-1, channels, length)
            courses.append(temporal(course).view(clips, height, width, length))
        return frames, courses

    def verdict(self, features: Sequence[Tensor], bound: int = 0) -> Tensor:
        """Mean over heads of the mean of what they say.

        Args:
            bound: 1: of max(0, 1 - it), -1: of max(0, 1 + it), the hinge losses of real and fake clips.
        """
        said = [each for kind in self(features) for each in kind]
        return torch.stack([(functional.relu(1 - bound * each) if bound else each).mean() for each in said]).mean()


def heads_loss(heads: Heads, real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Hinge losses, and the squared gradient of what the heads say at real features (R1)."""
    real = [feature.detach().requires_grad_() for feature in real]
    slopes = torch.autograd.grad(heads.verdict(real), real, create_graph=True)
    penalty = torch.stack([slope.square().sum() for slope in slopes]).sum() / real[0].shape[0]
    return heads.verdict(real, 1) + heads.verdict([each.detach() for each in fake], -1) + GRADIENT_PENALTY * penalty


def first_stages(teacher: nn.Module) -> list[str]:
    """Names of the modules whose outputs the heads read: a UNet's down blocks, or blocks of a stack's first half."""
    if hasattr(teacher, "down_blocks"):
        return [f"down_blocks.{number}" for number in range(len(teacher.down_blocks))]  # type: ignore[arg-type]
    stacks = [(len(child), name) for name, child in teacher.named_children() if isinstance(child, nn.ModuleList)]
    length, name = max(stacks)
    return list(dict.fromkeys(f"{name}.{max(0, round(share * length) - 1)}" for share in STACK_TAPS))


def stage_features(teacher: nn.Module, names: Sequence[str], call: DenoiserCall, layout: Layout) -> list[Tensor]:
    """(N, F, C, H, W) of every stage; what comes after the last one is not computed."""
    clip = noisy_sample(call)
    with watched(teacher, names, stop=True) as seen, suppress(LastSeen):
        answer(teacher, placed(call, teacher))
    streams = [max(seen[name], key=lambda stream: stream.numel()) for name in names]  # not that of the text
    return [layout.maps(stream, clip).float() for stream in streams]


def _head(convolution: type[nn.Conv1d] | type[nn.Conv2d], channels: int) -> nn.Sequential:
    return nn.Sequential(convolution(channels, WIDTH, 3, padding=1), nn.SiLU(), convolution(WIDTH, 1, 1))
