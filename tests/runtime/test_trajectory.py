from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

from dacc.core.errors import ConfigError, UnsupportedError
from dacc.core.reporter import silent
from dacc.runtime.clock import current_run
from dacc.runtime.compare import MAX_PSNR, Samples, compare, psnr, relative_l2, ssim
from dacc.runtime.request import RunRequest
from dacc.runtime.trajectory import capture_calls, measure_effect, sample

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 inside diffusers

PIPELINES = pytest.mark.parametrize("kind", ["unet_pipeline", "dit_pipeline"])


def _perturbed(pipe: Any, size: float = 0.02) -> Any:
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in denoiser.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * size)
    return pipe


@PIPELINES
def test_samples_do_not_depend_on_the_batch_they_are_in(kind: str, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(kind)()
    together = RunRequest(seeds=(3, 4, 5), num_inference_steps=3, class_labels=(7, 8, 9) if "dit" in kind else None)
    apart = together.model_copy(update={"batch_size": 2})
    first, second = sample(pipe, together), sample(pipe, apart)
    assert first.images.shape == (3, 1, 16, 16)
    assert first.images.dtype == first.latents.dtype == torch.float32
    assert first.latents.shape == ((3, 4, 8, 8) if "dit" in kind else (3, 1, 16, 16))
    torch.testing.assert_close(first.latents, second.latents, rtol=1e-4, atol=1e-4)
    assert not torch.equal(first.images[0], first.images[1])


def test_clips_keep_their_frames_and_do_not_depend_on_the_batch(video_pipeline: Callable[[], Any]) -> None:
    pipe = video_pipeline()
    together = RunRequest(seeds=(3, 4, 5), num_inference_steps=2, num_frames=3, guidance_scale=2.0)
    first, second = sample(pipe, together), sample(pipe, together.model_copy(update={"batch_size": 2}))
    assert len(first) == 3
    assert first.images.shape == (3, 3, 3, 32, 32)
    assert first.latents.shape == (3, 4, 3, 16, 16)
    torch.testing.assert_close(first.latents, second.latents, rtol=1e-4, atol=1e-4)


def test_likeness_of_clips_is_one_number_for_each() -> None:
    first = torch.rand(2, 3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    second = (first + torch.tensor([0.0, 0.1])[:, None, None, None, None]).clamp(0, 1)
    assert psnr(first, second).shape == (2,)
    assert psnr(first, second)[0] == MAX_PSNR
    error = (first[1] - second[1]).square().mean()
    assert psnr(first, second)[1].item() == pytest.approx(-10 * math.log10(error.item()), abs=1e-3)
    frames = ssim(first.flatten(0, 1), second.flatten(0, 1)).reshape(2, 3)
    torch.testing.assert_close(ssim(first, second), frames.mean(dim=1))


def test_latents_are_the_last_sample_of_the_scheduler(unet_pipeline: Callable[[], Any]) -> None:
    result = sample(unet_pipeline(), RunRequest(seeds=(1, 2), num_inference_steps=2))
    torch.testing.assert_close((result.latents / 2 + 0.5).clamp(0, 1), result.images)


def test_stochastic_solvers_repeat_and_leave_the_global_generator_alone(dit_pipeline: Callable[[], Any]) -> None:
    pipe = dit_pipeline()
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    before = torch.get_rng_state()
    first, second = (sample(pipe, RunRequest(seeds=(1, 2), num_inference_steps=2)) for _ in range(2))
    assert torch.equal(first.latents, second.latents)
    assert torch.equal(before, torch.get_rng_state())


def test_pipelines_that_return_arrays_or_pictures_are_read(unet_pipeline: Callable[[], Any]) -> None:
    pipe = unet_pipeline()
    request = RunRequest(seeds=(1, 2), num_inference_steps=2)
    expected = sample(pipe, request).images
    call = type(pipe).__call__
    for kind, tolerance in (("np", 1e-6), ("pil", 1 / 255)):

        class Other(type(pipe)):  # type: ignore[misc]
            def __call__(self, batch_size=1, generator=None, num_inference_steps=50, output_type="pil"):
                return call(self, batch_size, generator, num_inference_steps=num_inference_steps, output_type=kind)  # noqa: B023

        pipe.__class__ = Other
        torch.testing.assert_close(sample(pipe, request).images, expected, rtol=0, atol=tolerance)


def test_a_request_that_the_pipeline_cannot_honour_is_refused(unet_pipeline: Callable[[], Any]) -> None:
    pipe = unet_pipeline()
    with pytest.raises(ConfigError, match="DDIMPipeline does not take guidance_scale"):
        sample(pipe, RunRequest(seeds=(1,), guidance_scale=3.0))
    with pytest.raises(ConfigError, match="class_labels"):
        sample(pipe, RunRequest(seeds=(1,), class_labels=(1,)))

    class NeedsImage(type(pipe)):  # type: ignore[misc]
        def __call__(self, image, batch_size=1, generator=None, num_inference_steps=50, output_type="pil"):
            raise AssertionError

    pipe.__class__ = NeedsImage
    with pytest.raises(UnsupportedError, match="needs image"):
        sample(pipe, RunRequest(seeds=(1,)))


@PIPELINES
def test_captured_calls_replay_bit_for_bit(kind: str, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(kind)()
    component = "transformer" if "dit" in kind else "unet"
    denoiser = getattr(pipe, component)
    outputs = []
    hook = denoiser.register_forward_hook(
        lambda _, args, output: outputs.append(output[0] if isinstance(output, tuple) else output.sample)
    )
    calls = capture_calls(pipe, RunRequest(seeds=(1, 2), num_inference_steps=3))
    hook.remove()
    assert [call.state.call for call in calls if call.state] == [0, 1, 2]
    assert {call.component for call in calls} == {component}
    seen = []
    denoiser.register_forward_pre_hook(lambda *_: seen.append(current_run()))
    for call, expected in zip(calls, outputs, strict=True):
        replayed = call.replay(denoiser)
        assert torch.equal(replayed[0] if isinstance(replayed, tuple) else replayed.sample, expected)
    assert seen == [call.state for call in calls]


def test_relative_l2_is_the_mean_over_samples_of_the_norm_ratio() -> None:
    reference, other = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    expected = [
        math.sqrt(float(((a - b) ** 2).sum())) / math.sqrt(float((a**2).sum()))
        for a, b in zip(reference, other, strict=True)
    ]
    torch.testing.assert_close(relative_l2(reference, other).tolist(), expected)


def test_psnr_follows_its_formula_and_is_capped_for_equal_images() -> None:
    reference, other = torch.rand(2, 1, 16, 16), torch.rand(2, 1, 16, 16)
    other[1] = reference[1]
    expected = -10 * math.log10(float(((reference[0] - other[0]) ** 2).mean()))
    assert psnr(reference, other).tolist() == pytest.approx([expected, MAX_PSNR])


@pytest.mark.parametrize("size", [4, 8, 16, 64])
def test_ssim_works_for_small_images(size: int) -> None:
    images = torch.rand(3, 1, size, size)
    noisy = (images + 0.2 * torch.randn_like(images)).clamp(0, 1)
    assert ssim(images, images).tolist() == pytest.approx([1.0] * 3)
    assert all(0 < value < 1 for value in ssim(images, noisy).tolist())


@PIPELINES
def test_the_effect_grows_with_the_perturbation(kind: str, request: pytest.FixtureRequest) -> None:
    make = request.getfixturevalue(kind)
    same, small, large = (
        measure_effect(make(), other, seeds=2, steps=2)
        for other in (make(), _perturbed(make(), 0.005), _perturbed(make(), 0.05))
    )
    assert (same.relative_l2, same.psnr, same.seeds, same.steps) == (None, MAX_PSNR, 2, 2)
    assert small.relative_l2 < large.relative_l2
    assert small.psnr > large.psnr


def test_an_effect_beyond_the_budget_is_not_measured_and_said_so(unet_pipeline: Callable[[], Any]) -> None:
    reporter = silent()
    effect = measure_effect(unet_pipeline(), unet_pipeline(), budget_seconds=1e-6, reporter=reporter)
    assert effect.relative_l2 is None
    assert "more than" in str(effect.not_measured)
    assert "was not measured" in reporter.notices[0]


def test_a_broken_result_is_named_instead_of_averaged() -> None:
    good = Samples(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4))
    bad = Samples(good.latents * float("nan"), good.images)
    assert "NaN" in str(compare(good, bad).not_measured)


def test_latents_that_nothing_could_change_are_not_measured(dit_pipeline: Callable[[], Any]) -> None:
    other, reporter = dit_pipeline(), silent()
    with torch.no_grad():
        other.vae.decoder.conv_out.weight.mul_(1.5)
    effect = measure_effect(dit_pipeline(), other, seeds=2, steps=2, reporter=reporter)
    assert effect.relative_l2 is None
    assert "no denoiser was treated" in str(effect.not_measured)
    assert 0 < effect.psnr < MAX_PSNR
    assert reporter.notices == []  # the images were measured: nothing went wrong


def test_a_treated_denoiser_that_gives_the_same_is_at_no_distance(dit_pipeline: Callable[[], Any]) -> None:
    other = dit_pipeline()
    embedder = other.transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table
    with torch.no_grad():
        embedder.weight[500] += 1  # of a class that is not drawn
    effect = measure_effect(dit_pipeline(), other, seeds=2, steps=2)
    assert (effect.relative_l2, effect.not_measured) == (0.0, None)
