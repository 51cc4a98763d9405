"""What is to be denoised in a call, and where the frames of a clip are: in it, and in what modules give.

Letters: N clips, F frames, C channels, H height, W width, L tokens, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..runtime.trajectory import DenoiserCall

FRAMES_FIRST = ("UNetSpatioTemporalConditionModel", "CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel")
PACKED = ("LTXVideoTransformer3DModel",)  # clips are rows of tokens, frame by frame
SAMPLES = ("sample", "hidden_states")  # names of the noisy clip where it is no positional argument
CLIP, TOKENS = 5, 3  # dimensions


@dataclass(frozen=True)
class Layout:
    """Shape of the clips of one call."""

    clips: int  # N
    frames: int  # F
    axis: int  # of the frames in the noisy clip, 1 or 2; the channels are on the other one
    patch: int = 1  # frames that one token spans

    def by_frame(self, feature: Tensor) -> Tensor:
        """(N, F', ...): a feature with its frames on axis 1; what does not tell its frames apart counts as one."""
        if feature.ndim == CLIP:
            return feature.movedim(2, 1)
        if feature.shape[0] == self.clips * self.frames:
            return feature.unflatten(0, (self.clips, self.frames))
        frames = self.frames // self.patch
        if feature.ndim == TOKENS and feature.shape[1] % frames == 0:  # (N, L, D): tokens of a frame follow each other
            return feature.unflatten(1, (frames, -1))
        return feature.unsqueeze(1)

    def maps(self, feature: Tensor, clip: Tensor) -> Tensor:
        """(N, F', C, H, W): a feature as one map for each frame.

        Args:
            clip: what entered the network; says how tokens lie in a frame.
        """
        frames = self.by_frame(feature)
        if frames.ndim == CLIP:
            return frames
        height, width = clip.shape[-2:]
        side = round((height * width / frames.shape[2]) ** 0.5)  # of a patch
        return frames.movedim(-1, 2).unflatten(-1, (height // side, width // side))


def layout_of(model: nn.Module, call: DenoiserCall) -> Layout | None:
    """The frames of a call; None for images, and for clips that enter as a plain list of tokens."""
    known = bool(call.args) or any(name in call.kwargs for name in SAMPLES)
    clip = noisy_sample(call) if known else None
    if not isinstance(clip, Tensor) or clip.ndim != CLIP:
        return None
    axis = 1 if type(model).__name__ in FRAMES_FIRST else 2
    return Layout(clip.shape[0], clip.shape[axis], axis, _patch(getattr(model, "config", {})))


def noisy_sample(call: DenoiserCall) -> Tensor:
    """What is to be denoised."""
    found: Tensor = call.args[0] if call.args else next(call.kwargs[name] for name in SAMPLES if name in call.kwargs)
    return found


def timestep(call: DenoiserCall) -> Any:
    """Its timestep, a tensor or a number."""
    return call.args[1] if len(call.args) > 1 else call.kwargs["timestep"]


def with_sample(call: DenoiserCall, sample: Tensor, at: Any = None) -> DenoiserCall:
    """The same call with another noisy sample, and at another timestep where one is given."""
    args, kwargs = list(call.args), dict(call.kwargs)
    for number, (names, value) in enumerate(((SAMPLES, sample), (("timestep",), at))):
        if value is None:
            continue
        if len(args) > number:
            args[number] = value
        else:
            kwargs[next(name for name in names if name in kwargs)] = value
    return DenoiserCall(call.component, call.state, tuple(args), kwargs)


def noisy_part(call: DenoiserCall, layout: Layout | None, output: Tensor) -> Tensor:
    """Of the noisy sample what `output` is about: conditions may come as channels behind it."""
    sample = noisy_sample(call)
    axis = _channels(sample, layout)
    return sample.narrow(axis, 0, output.shape[axis])


def with_noisy_part(call: DenoiserCall, layout: Layout | None, part: Tensor, at: Any = None) -> DenoiserCall:
    """The same call with another such part, the conditions behind it as they were; see `with_sample`."""
    sample = noisy_sample(call)
    axis = _channels(sample, layout)
    wide = part.shape[axis]
    conditions = sample.narrow(axis, wide, sample.shape[axis] - wide)
    return with_sample(call, torch.cat([part.to(sample.dtype), conditions], axis), at)


def cut_frames(call: DenoiserCall, layout: Layout, first: int, count: int) -> DenoiserCall:
    """Some consecutive frames of a call: of the clip, and of conditions that come once for every frame."""
    clip = noisy_sample(call)

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != layout.clips * layout.frames:
            return value
        return value.unflatten(0, (layout.clips, layout.frames))[:, first : first + count].flatten(0, 1)

    args = (clip, *tree_map(cut, call.args[1:])) if call.args else ()
    rest = DenoiserCall(call.component, call.state, args, tree_map(cut, call.kwargs))
    return with_sample(rest, clip.narrow(layout.axis, first, count), timestep(call))


def _channels(sample: Tensor, layout: Layout | None) -> int:
    """Their axis: beside the frames of a clip, last in tokens."""
    if layout:
        return 3 - layout.axis
    return -1 if sample.ndim == TOKENS else 1


def _patch(config: Any) -> int:
    size = config.get("patch_size")
    return int(size[0]) if isinstance(size, (list, tuple)) else config.get("patch_size_t") or 1
