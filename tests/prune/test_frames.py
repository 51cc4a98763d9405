"""Where frames are, in the denoisers that have them."""

import pytest
import torch

from dacc.prune.frames import Layout, cut_frames, layout_of, noisy_sample, timestep, with_sample
from dacc.runtime.trajectory import DenoiserCall


def named(name, **config):
    return type(name, (torch.nn.Module,), {"config": config})()


@pytest.mark.parametrize(
    ("model", "shape", "layout"),
    [
        (named("UNetMotionModel"), (2, 4, 6, 8, 8), Layout(2, 6, 2)),
        (named("UNetSpatioTemporalConditionModel"), (2, 6, 8, 8, 8), Layout(2, 6, 1)),
        (named("WanTransformer3DModel", patch_size=(1, 2, 2)), (2, 16, 5, 8, 8), Layout(2, 5, 2)),
        (named("CogVideoXTransformer3DModel", patch_size=2, patch_size_t=2), (1, 6, 4, 8, 8), Layout(1, 6, 1, 2)),
        (named("CogVideoXTransformer3DModel", patch_size=2, patch_size_t=None), (1, 6, 4, 8, 8), Layout(1, 6, 1)),
        (named("UNet2DConditionModel"), (2, 4, 8, 8), None),
        (named("LTXVideoTransformer3DModel"), (2, 48, 16), None),
    ],
)
def test_layouts(model, shape, layout):
    assert layout_of(model, DenoiserCall("unet", None, (), {"sample": torch.zeros(shape)})) == layout


def test_unknown_arguments_are_no_clip():
    assert layout_of(named("ZImage"), DenoiserCall("transformer", None, ([torch.zeros(4, 1, 8, 8)],), {})) is None
    assert layout_of(named("Other"), DenoiserCall("transformer", None, (), {"x": torch.zeros(1, 4, 3, 8, 8)})) is None


def test_features_by_frame():
    layout = Layout(clips=2, frames=6, axis=2)
    maps = torch.arange(12.0).view(12, 1, 1, 1).expand(12, 3, 4, 4)  # frame by frame, clip after clip
    assert layout.by_frame(maps)[1, 2].unique().tolist() == [8.0]
    assert layout.by_frame(maps).shape == (2, 6, 3, 4, 4)
    volume = torch.arange(6.0).view(1, 1, 6, 1, 1).expand(2, 3, 6, 4, 4)
    assert layout.by_frame(volume)[:, 5].unique().tolist() == [5.0]
    tokens = torch.arange(6.0).repeat_interleave(4).view(1, 24, 1).expand(2, 24, 5)
    assert layout.by_frame(tokens)[:, 3].unique().tolist() == [3.0]
    assert layout.by_frame(torch.zeros(2, 7, 5)).shape == (2, 1, 7, 5)
    assert Layout(2, 6, 1, patch=2).by_frame(tokens).shape == (2, 3, 8, 5)


def test_tokens_lie_in_a_frame_as_patches_do():
    layout, clip = Layout(clips=2, frames=3, axis=2), torch.randn(2, 5, 3, 8, 4)
    patches = torch.nn.functional.conv3d(clip, torch.eye(5)[:, :, None, None, None], stride=(1, 2, 2))
    tokens = patches.flatten(2).transpose(1, 2)  # as the transformers of diffusers make them
    assert torch.equal(layout.maps(tokens, clip), patches.movedim(2, 1))


def test_a_part_of_the_frames_takes_its_conditions_along():
    words = torch.arange(12.0).view(12, 1, 1).expand(12, 3, 8)
    kwargs = {"encoder_hidden_states": words, "return_dict": False}
    call = DenoiserCall("unet", None, (torch.randn(2, 4, 6, 8, 8), torch.tensor(7)), kwargs)
    part = cut_frames(call, Layout(2, 6, 2), 1, 4)
    assert torch.equal(noisy_sample(part), noisy_sample(call)[:, :, 1:5])
    assert part.kwargs["encoder_hidden_states"][:, 0, 0].tolist() == [1, 2, 3, 4, 7, 8, 9, 10]
    assert part.args[1] is call.args[1]
    assert part.kwargs["return_dict"] is False


@pytest.mark.parametrize("positional", [True, False])
def test_the_sample_can_be_exchanged(positional):
    sample, time = torch.zeros(1, 2, 3, 4, 4), torch.tensor(7)
    args, kwargs = ((sample, time), {}) if positional else ((), {"hidden_states": sample, "timestep": time})
    other = with_sample(DenoiserCall("unet", None, args, kwargs), sample + 1, torch.tensor(3))
    assert torch.equal(noisy_sample(other), sample + 1)
    assert int(timestep(other)) == 3
    assert (len(other.args), set(other.kwargs)) == (len(args), set(kwargs))
    alone = with_sample(DenoiserCall("unet", None, args, kwargs), sample + 1)
    assert torch.equal(noisy_sample(alone), sample + 1)
    assert int(timestep(alone)) == 7
