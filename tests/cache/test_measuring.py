from __future__ import annotations

import diffusers
import pytest

from dacc.cache.measuring import loop_seconds
from dacc.runtime.clockwork import attach_clock
from dacc.runtime.request import RunRequest


@pytest.mark.parametrize(
    "name", ["DDIM", "EulerDiscrete", "DPMSolverMultistep", "HeunDiscrete", "PNDM", "UniPCMultistep"]
)
def test_a_loop_waits_for_the_accelerator_before_its_first_call_and_after_its_last_step(sd_pipeline, name, monkeypatch):
    pipe, events = sd_pipeline(), list[str]()
    pipe.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(pipe.scheduler.config)
    attach_clock(pipe)
    pipe.unet.register_forward_hook(lambda *_: events.append("call"))

    def now(_: object) -> float:
        events.append("wait")
        return 10.0 * len(events)

    monkeypatch.setattr("dacc.cache.measuring.now", now)
    seconds = loop_seconds(pipe, RunRequest(seeds=(0,), num_inference_steps=4, guidance_scale=1.0, height=32, width=32))
    calls = events.count("call")
    assert events == ["wait", *["call"] * calls, "wait"]
    assert seconds == 10 * (calls + 1)
