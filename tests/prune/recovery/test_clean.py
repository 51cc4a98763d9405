"""Clean samples against the schedulers of diffusers, and new noise levels."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
)

from dacc.core.schedule_id import read_grid
from dacc.prune.recovery.clean import NoiseLevels, clean_sample, level_of
from dacc.runtime.clock import RunState


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_clean_samples_are_those_of_ddim(prediction):
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(10)
    sigmas, (x, output) = read_grid(scheduler)[1], torch.randn(2, 1, 4, 4, 4)
    for time, sigma in zip(scheduler.timesteps, sigmas, strict=True):
        wanted = scheduler.step(output, time, x).pred_original_sample
        found = clean_sample(x, output, level_of(sigma, prediction), prediction)
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
    found = clean_sample(entering, output, level_of(sigma, prediction), prediction)
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4)


def test_flow_predicts_noise_minus_sample():
    clean, noise = torch.randn(2, 1, 4, 4, 4)
    level = level_of(0.3, "flow")
    x = level.signal * clean + level.noise * noise
    assert torch.allclose(clean_sample(x, noise - clean, level, "flow"), clean, atol=1e-6)


def states(flow):
    sigmas = [1.0, 0.9, 0.5, 0.1] if flow else [20.0, 3.0, 1.0, 0.05]
    return [RunState(-1, call, 4, call, 4, 900.0 - 300 * call, sigma) for call, sigma in enumerate(sigmas)]


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_new_levels_are_log_normal_within_the_grid_and_fit_their_timesteps(prediction):
    levels, generator = NoiseLevels(states(prediction == "flow"), prediction), torch.Generator().manual_seed(0)
    drawn = [levels.draw(generator, whole=False) for _ in range(2000)]
    logs = sorted(math.log(level.ratio) for _, level in drawn)
    assert logs[1000] == pytest.approx(-1, abs=0.1)
    assert logs[1682] - logs[1000] == pytest.approx(1, abs=0.15)
    highest, lowest = (math.log(9), math.log(1 / 9)) if prediction == "flow" else (math.log(20), math.log(0.05))
    assert lowest - 1e-6 <= logs[0] <= logs[-1] <= highest + 1e-6
    assert all(level_of(state.sigma, prediction) for state in states(prediction == "flow"))
    for time, level in drawn[:50]:
        above = [state for state in states(prediction == "flow") if state.timestep >= time]
        below = [state for state in states(prediction == "flow") if state.timestep <= time]
        ratios = [level_of(state.sigma, prediction).ratio for state in (min(above, key=_time), max(below, key=_time))]
        assert ratios[1] - 1e-6 <= level.ratio <= ratios[0] + 1e-6


def _time(state):
    return state.timestep


def test_whole_timesteps_get_the_level_that_they_have():
    levels = NoiseLevels(states(False), "epsilon")
    time, level = levels.draw(torch.Generator().manual_seed(1), whole=True)
    assert time == int(time)
    left = (time - 0) / 300 if time < 300 else (time - 300) / 300
    ends = (0.05, 1.0) if time < 300 else (1.0, 3.0)
    assert level.ratio == pytest.approx(math.exp((1 - left) * math.log(ends[0]) + left * math.log(ends[1])), rel=1e-4)


def test_levels_need_sigmas():
    assert not NoiseLevels([None, RunState(-1, 0, 2, 0, 2, 500.0, None)], "epsilon")
    assert NoiseLevels(states(False), "epsilon")
