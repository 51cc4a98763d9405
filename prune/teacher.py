"""The whole network with what enters it: how far its outputs move when parts are skipped, call by call.

Nothing is sampled anew: every call has the input that it has in a run of the whole network. Both guidance branches are
combined as the pipeline does it where the scale is known, since guidance amplifies differences.

Letters: B rows of a batch, C channels, F frames.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.passthrough import skipping
from ..runtime.trajectory import DenoiserCall
from .frames import PACKED, layout_of, noisy_sample
from .noise import Noise

CLASS_FIRST = ("DiTTransformer2DModel",)  # the batch of both guidance branches begins with the guided one


@dataclass(frozen=True)
class Errors:
    """What the outputs lose, averaged over the calls."""

    relative: float  # squared error over squared output
    content: float | None = None  # of videos: squared error of the frames of the predicted clean sample
    motion: float | None = None  # and of the differences of neighbouring frames


class Teacher:
    """A network and the calls that its parts are judged on.

    Args:
        denoiser: in evaluation mode.
        calls: from a calibration set, at least one; evaluations of one call of one run follow each other.
        guidance_scale: with which they were recorded; None or 1: the branches are not combined.
        noise: how the network's outputs are related to clean samples, for videos.
    """

    def __init__(
        self, denoiser: nn.Module, calls: Sequence[DenoiserCall], guidance_scale: float | None, noise: Noise
    ) -> None:
        self.denoiser, self.noise = denoiser, noise
        self.guidance_scale = guidance_scale if guidance_scale != 1 else None
        self.calls = list(calls)
        self._groups = [list(group) for _, group in groupby(self.calls, key=_moment)]
        self._wanted: list[Tensor] | None = None
        self.layout = layout_of(denoiser, self.calls[0])
        self.is_video = self.layout is not None or type(denoiser).__name__ in PACKED

    def errors(self, removed: Collection[str]) -> Errors:
        """How far the outputs move without some modules."""
        if self._wanted is None:
            self._wanted = [self._predict(group) for group in self._groups]
        relative, content, motion = [], [], []
        with skipping(self.denoiser, removed):
            for group, wanted in zip(self._groups, self._wanted, strict=True):
                change = (self._predict(group) - wanted).double()
                relative.append((change.square().sum() / wanted.double().square().sum().clamp(min=1e-30)).item())
                if self.is_video:
                    frames = self._frames_of(change, group[0])
                    weight = self.noise.clean_factor(group[0].state) ** 2
                    content.append(weight * frames.square().mean().item())
                    steps = frames.diff(dim=1)
                    motion.append(weight * steps.square().mean().item() if steps.shape[1] else 0.0)
        if not content:
            return Errors(_mean(relative))
        return Errors(_mean(relative), _mean(content), _mean(motion))

    def _frames_of(self, output: Tensor, call: DenoiserCall) -> Tensor:
        """(B, F, rest)."""
        if self.layout is None:
            return output.unflatten(1, (call.kwargs["num_frames"], -1)).flatten(2)
        return output.movedim(self.layout.axis, 1).flatten(2)

    def _predict(self, group: list[DenoiserCall]) -> Tensor:
        """The prediction that the solver gets in one call: branches combined, learned variances left out."""
        outputs = [prediction(call, call.replay(self.denoiser)) for call in group]
        branches = [call.state.branch if call.state else None for call in group]
        if self.guidance_scale is None:
            return torch.cat(outputs)
        if len(outputs) == 1 and branches[0] == "both":
            first, second = outputs[0].chunk(2)
            given, empty = (first, second) if type(self.denoiser).__name__ in CLASS_FIRST else (second, first)
        elif len(outputs) == 2 and set(branches) == {"cond", "uncond"}:
            given, empty = outputs if branches[0] == "cond" else reversed(outputs)
        else:
            return torch.cat(outputs)
        return empty + self.guidance_scale * (given - empty)


def some_of(calls: Sequence[DenoiserCall], samples: int, timesteps: int) -> list[DenoiserCall]:
    """Of at least so many samples at most so many calls each, the first and the last among them: whole runs and whole
    calls, so that guidance branches stay together. All, where the calls tell no runs.

    Args:
        calls: from a calibration set, in its order.
    """
    if any(call.state is None for call in calls):
        return list(calls)
    found: list[DenoiserCall] = []
    seen = 0
    for _, run in groupby(calls, key=lambda call: call.state and call.state.run):
        if seen >= samples:
            break
        moments = [list(group) for _, group in groupby(run, key=_moment)]
        count = min(timesteps, len(moments))
        places = [round(part * (len(moments) - 1) / max(count - 1, 1)) for part in range(count)]
        found += [call for place in places for call in moments[place]]
        first = moments[0][0]
        seen += len(noisy_sample(first)) // (2 if first.state and first.state.branch == "both" else 1)
    return found


def prediction(call: DenoiserCall, output: Any) -> Tensor:
    """What a network says of the noise, without the variances that some learn beside it."""
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    channels = noisy_sample(call).shape[1]
    return first[:, :channels] if first.ndim == 4 and first.shape[1] == 2 * channels else first


def _moment(call: DenoiserCall) -> tuple[int, int] | int:
    return (call.state.run, call.state.call) if call.state else id(call)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
