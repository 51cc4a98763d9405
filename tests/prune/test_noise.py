"""What networks predict, told by the folder of a pipeline; clean samples against the schedulers of diffusers."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from dacc.core.schedule_id import read_grid
from dacc.prune.noise import Noise, noise_of


@pytest.mark.parametrize(
    ("scheduler", "noise"),
    [
        (DDIMScheduler(), Noise("epsilon")),
        (EulerDiscreteScheduler(prediction_type="v_prediction"), Noise("v_prediction")),
        (FlowMatchEulerDiscreteScheduler(), Noise("flow")),
        (UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), Noise("flow")),
        (EDMEulerScheduler(), Noise("epsilon", is_plain=False)),
    ],
)
def test_schedulers_say_what_is_predicted(scheduler, noise, tmp_path):
    scheduler.save_pretrained(tmp_path / "scheduler")
    assert noise_of(tmp_path) == noise


def test_without_a_scheduler_it_is_noise(tmp_path):
    assert noise_of(tmp_path) == Noise("epsilon")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_clean_samples_are_those_of_ddim(prediction):
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(10)
    sigmas, (x, output) = read_grid(scheduler)[1], torch.randn(2, 1, 4, 4, 4)
    for time, sigma in zip(scheduler.timesteps, sigmas, strict=True):
        wanted = scheduler.step(output, time, x).pred_original_sample
        found = Noise(prediction).clean(x, output, sigma)
        assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_clean_samples_are_those_of_euler_from_what_enters_the_denoiser(prediction):
    scheduler = EulerDiscreteScheduler(prediction_type=prediction)
    scheduler.set_timesteps(5)
    sigmas = read_grid(scheduler)[1]
    time, sigma = scheduler.timesteps[2], sigmas[2]
    x, output = torch.randn(2, 1, 4, 4, 4)
    entering = scheduler.scale_model_input(x, time)
    wanted = scheduler.step(output, time, x).pred_original_sample
    found = Noise(prediction).clean(entering, output, sigma)
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4)


def test_flow_predicts_noise_minus_sample():
    clean, noise = torch.randn(2, 1, 4, 4, 4)
    flow = Noise("flow")
    x = flow.mixed(clean, noise, 0.3)
    assert torch.allclose(x, 0.7 * clean + 0.3 * noise)
    assert torch.equal(flow.wanted(clean, noise, 0.3), noise - clean)
    assert torch.allclose(flow.clean(x, noise - clean, 0.3), clean, atol=1e-6)


@pytest.mark.parametrize("target", ["epsilon", "flow"])
def test_levels_and_ratios_of_noise_over_signal_belong_together(target):
    noise = Noise(target)
    for level in (0.05, 0.3, 0.9):
        assert noise.level_at(noise.ratio(level)) == pytest.approx(level)
    assert Noise("flow").ratio(0.75) == pytest.approx(3)
