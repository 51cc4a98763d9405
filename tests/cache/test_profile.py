"""What calls take."""

from __future__ import annotations

from typing import Any

import pytest

from dacc.cache import profile
from dacc.cache.measuring import loop_seconds
from dacc.core.reporter import silent

from ..runtime.cache_plans import OUTPUT, blocks, denoiser_of
from ..runtime.test_cached import FLUX, Recorder, request_of


@pytest.mark.parametrize(
    ("kind", "unit", "guidance", "inside"),
    [
        ("unet_pipeline", OUTPUT, None, "conv_in"),
        ("dit_pipeline", blocks(0, 2), 2.0, "transformer_blocks.0.ff"),
        ("flux_pipeline", blocks(0, 2, *FLUX), 2.0, "transformer_blocks.0.attn"),  # branches one after the other
    ],
)
def test_a_call_takes_what_the_run_does_up_to_the_next_one_too(request, monkeypatch, kind, unit, guidance, inside):
    pipe = request.getfixturevalue(kind)()
    name, denoiser = denoiser_of(pipe)
    asked = request_of(pipe, guidance_scale=guidance, num_inference_steps=20)
    calls, _ = profile.first_calls(pipe, name, asked)
    recorder = Recorder(denoiser.get_submodule(inside))
    computed: list[int] = []

    def loop(*args: Any) -> float:
        recorder.calls.clear()
        loop_seconds(*args)
        computed.append(len(recorder.calls))
        return 100.0 * profile.LOOP_STEPS + len(computed)  # the least of several counts

    monkeypatch.setattr(profile, "loop_seconds", loop)
    found = profile.time_calls(denoiser, (unit,), calls, silent(), pipe, asked)
    assert computed == [0] * profile.LOOPS
    assert found.partial_seconds == pytest.approx((100.0 * profile.LOOP_STEPS + 1) / profile.LOOP_STEPS)
    assert 0 < abs(found.full_seconds - found.partial_seconds) < 50
    assert denoiser.forward.__func__ is type(denoiser).forward


def test_of_several_denoisers_the_call_alone_is_timed(unet_pipeline, monkeypatch):
    pipe = unet_pipeline()
    asked = request_of(pipe)
    calls, _ = profile.first_calls(pipe, "unet", asked)
    monkeypatch.setattr(profile, "denoisers", lambda pipe: {"unet": pipe.unet, "other": pipe.unet})
    monkeypatch.setattr(profile, "loop_seconds", lambda *_: pytest.fail("a run"))
    found = profile.time_calls(pipe.unet, (OUTPUT,), calls, silent(), pipe, asked)
    assert 0 < found.partial_seconds < found.full_seconds
