"""What networks predict, told by the folder of a pipeline."""

import pytest
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

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
