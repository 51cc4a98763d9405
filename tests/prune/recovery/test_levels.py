"""New noise levels are log-normal, within the grid, and fit their timesteps."""

import math

import pytest
import torch

from dacc.prune.noise import Noise
from dacc.prune.recovery.levels import NoiseLevels
from dacc.runtime.clock import RunState


def states(flow):
    sigmas = [1.0, 0.9, 0.5, 0.1] if flow else [20.0, 3.0, 1.0, 0.05]
    return [RunState(-1, call, 4, call, 4, 900.0 - 300 * call, sigma) for call, sigma in enumerate(sigmas)]


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_new_levels_are_log_normal_within_the_grid_and_fit_their_timesteps(prediction):
    levels, generator = NoiseLevels(states(prediction == "flow"), Noise(prediction)), torch.Generator().manual_seed(0)
    drawn = [levels.draw(generator, whole=False) for _ in range(2000)]
    logs = sorted(math.log(Noise(prediction).ratio(level)) for _, level in drawn)
    assert logs[1000] == pytest.approx(-1, abs=0.1)
    assert logs[1682] - logs[1000] == pytest.approx(1, abs=0.15)
    highest, lowest = (math.log(9), math.log(1 / 9)) if prediction == "flow" else (math.log(20), math.log(0.05))
    assert lowest - 1e-6 <= logs[0] <= logs[-1] <= highest + 1e-6
    for time, level in drawn[:50]:
        above = [state for state in states(prediction == "flow") if state.timestep >= time]
        below = [state for state in states(prediction == "flow") if state.timestep <= time]
        ratios = [Noise(prediction).ratio(state.sigma) for state in (min(above, key=_time), max(below, key=_time))]
        assert ratios[1] - 1e-6 <= Noise(prediction).ratio(level) <= ratios[0] + 1e-6


def _time(state):
    return state.timestep


def test_whole_timesteps_get_the_level_that_they_have():
    levels = NoiseLevels(states(False), Noise("epsilon"))
    time, level = levels.draw(torch.Generator().manual_seed(1), whole=True)
    assert time == int(time)
    left = (time - 0) / 300 if time < 300 else (time - 300) / 300
    ends = (0.05, 1.0) if time < 300 else (1.0, 3.0)
    assert level == pytest.approx(math.exp((1 - left) * math.log(ends[0]) + left * math.log(ends[1])), rel=1e-4)


def test_levels_need_sigmas():
    assert not NoiseLevels([None, RunState(-1, 0, 2, 0, 2, 500.0, None)], Noise("epsilon"))
    assert NoiseLevels(states(False), Noise("epsilon"))
