from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from dacc.cache.methods import encoder
from dacc.cache.planned import planned
from dacc.core.schedule_id import read_grid
from dacc.runtime.clock import RunState
from dacc.runtime.installed import no_cache, remove_plans_
from dacc.runtime.prior_noise import PriorNoise
from dacc.runtime.trajectory import sample

from .cache_plans import ENCODER, plan_for
from .test_cached import drive, installed, request_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 inside diffusers
CODES, SHARE = "CRRCRRRR", 0.003


def by_hand(pipe: Any, share: float) -> torch.Tensor:
    """Slow and obvious: the loop of a pipeline with one more line."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(len(CODES))
    latents = first = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            noise = pipe.unet(latents, timestep).sample
            if timestep / 1000 < 0.5:
                latents = latents + share * first
            latents = scheduler.step(noise, timestep, latents).prev_sample
    return latents


def test_the_first_noise_is_added_again_before_late_steps(unet_pipeline):
    pipe = unet_pipeline()
    installed(pipe, {ENCODER: CODES})
    plain, wanted = by_hand(pipe, 0.0), by_hand(pipe, SHARE)
    assert not torch.equal(plain, wanted)
    installed(pipe, {ENCODER: CODES}, prior_noise=SHARE)
    assert torch.equal(by_hand(pipe, 0.0), wanted)
    assert torch.equal(by_hand(pipe, 0.0), wanted)  # the noise of a run is its own
    with no_cache(pipe):
        full = by_hand(pipe, 0.0)
    remove_plans_(pipe)
    assert torch.equal(by_hand(pipe, 0.0), full)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"])
@pytest.mark.parametrize("spacing", ["linspace", "leading"])
def test_with_every_solver_the_denoiser_sees_the_same_share(name, spacing):
    scheduler = getattr(diffusers, name)(timestep_spacing=spacing)
    scheduler.set_timesteps(20)
    timesteps, sigmas = read_grid(scheduler)
    first = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = PriorNoise(SHARE)
    for call, (timestep, sigma) in enumerate(zip(timesteps, sigmas, strict=True)):
        state = RunState(1, call, len(timesteps), call, 20, timestep, sigma)
        sample = first * scheduler.init_noise_sigma if call == 0 else torch.zeros_like(first)
        added = noise(sample, state, scheduler) - sample
        seen = added if name == "DDIMScheduler" else added / (1 + sigma**2) ** 0.5
        torch.testing.assert_close(seen, SHARE * first if timestep < 500 else torch.zeros_like(first))


def test_a_run_that_begins_in_the_middle_has_no_noise_that_it_began_with(unet_pipeline):
    pipe = unet_pipeline()
    installed(pipe, {ENCODER: CODES})
    wanted = drive(pipe, 8, start=2)
    installed(pipe, {ENCODER: CODES}, prior_noise=SHARE)
    assert torch.equal(drive(pipe, 8, start=2), wanted)
    assert not torch.equal(drive(pipe, 8), wanted)


def test_pipelines_step_from_the_changed_sample_whatever_decodes_ahead(unet_pipeline):
    pipe = unet_pipeline()
    request = request_of(pipe, num_inference_steps=8)
    installed(pipe, {ENCODER: CODES}, prior_noise=0.05)
    noisy = sample(pipe, request).latents
    installed(pipe, {ENCODER: CODES}, prior_noise=0.05, decode_ahead=3)
    torch.testing.assert_close(sample(pipe, request).latents, noisy)
    installed(pipe, {ENCODER: CODES})
    plain = sample(pipe, request).latents
    assert not torch.allclose(plain, noisy)


def test_the_field_reaches_the_plan_and_plans_without_it_are_written_as_before(unet_pipeline):
    blank = plan_for(unet_pipeline(), {ENCODER: "C" * 8})
    made = planned(blank, (0, 3), encoder, encoder.EncoderConfig(prior_noise=SHARE))
    assert made.prior_noise == SHARE
    assert made.model_dump()["prior_noise"] == SHARE
    assert "prior_noise" not in planned(blank, (0, 3), encoder, encoder.EncoderConfig()).model_dump()
    with pytest.raises(ValueError, match="prior_noise"):
        plan_for(unet_pipeline(), {ENCODER: "C" * 8}, prior_noise=0.5)
