from __future__ import annotations

import math

import pytest
import torch

import dacc
from dacc import CalibrateConfig, calibrate_pipeline
from dacc.calibrate import sensitivity
from dacc.calibrate.sensitivity import call_sensitivity, interpolated
from dacc.core.calibration import read_calibration
from dacc.core.reporter import silent
from dacc.runtime.request import RunRequest
from dacc.runtime.trajectory import capture_calls, sample

STEPS = 6


@pytest.fixture
def record(unet_folder, tmp_path):
    config = CalibrateConfig(samples=3, batch_size=2, steps=STEPS, timesteps=2)
    return read_calibration(calibrate_pipeline(unet_folder, config, output=tmp_path / "set", device="cpu"))


def test_at_the_last_call_it_is_what_the_solver_makes_of_the_error(unet_folder, record):
    found = call_sensitivity(unet_folder, "unet", record, device="cpu", reporter=silent())
    assert len(found) == STEPS
    request = RunRequest(seeds=tuple(one.seed for one in record.samples), num_inference_steps=STEPS, batch_size=2)
    pipe = dacc.load(unet_folder, device="cpu")
    final = sample(pipe, request).latents
    logs = []
    for start in (0, 2):  # its batches
        part = request.model_copy(update={"seeds": request.seeds[start : start + 2]})
        *_, last = capture_calls(pipe, part)
        given = last.replay(pipe.unet)[0]
        noise = torch.randn(given.shape, generator=torch.Generator().manual_seed(0))
        wrong = record.schedule.sigmas[-1] * given.square().mean().sqrt() * noise  # x0 = (x - s e) / a, s / a = sigma
        for one, other in zip(wrong, final[start : start + 2], strict=True):
            logs.append(math.log(float(one.norm() / other.norm())))
    assert found[-1] == pytest.approx(math.exp(sum(logs) / 3), rel=1e-3)


def test_it_repeats_and_leaves_no_hook(unet_folder, record, monkeypatch):
    pipes = []
    load = sensitivity.load_source
    monkeypatch.setattr(sensitivity, "load_source", lambda *a, **k: pipes.append(load(*a, **k)) or pipes[-1])
    first, second = (call_sensitivity(unet_folder, "unet", record, device="cpu", reporter=silent()) for _ in range(2))
    assert first == second
    assert all(value > 0 for value in first)
    assert not any(pipe.unet._forward_hooks for pipe in pipes)


def test_a_larger_error_is_not_a_larger_sensitivity(unet_folder, record, monkeypatch):
    usual = call_sensitivity(unet_folder, "unet", record, device="cpu", reporter=silent())
    monkeypatch.setattr(sensitivity, "ERROR", 0.02)
    small = call_sensitivity(unet_folder, "unet", record, device="cpu", reporter=silent())
    assert small == pytest.approx(usual, rel=0.2)


def test_guided_runs_of_a_set_are_made_again(dit_folder, tmp_path):
    config = CalibrateConfig(samples=2, batch_size=2, steps=3, timesteps=2, guidance_scale=2.0, class_labels=(1, 2))
    record = read_calibration(calibrate_pipeline(dit_folder, config, output=tmp_path / "set", device="cpu"))
    found = call_sensitivity(dit_folder, "transformer", record, device="cpu", reporter=silent())
    assert len(found) == 3
    assert all(value > 0 for value in found)


def test_between_probes_the_logarithm_is_linear():
    assert interpolated({0: 1.0, 2: 4.0}, 4) == pytest.approx([1.0, 2.0, 4.0, 4.0])
    assert interpolated({}, 2) == [1.0, 1.0]
