"""What is kept is what entered the denoiser, whatever the pipeline and its scheduler."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from dacc import current_run, open_calibration
from dacc.core.errors import CalibrationError, ConfigError
from dacc.core.reporter import silent
from dacc.core.seeds import seed_stream

from .conftest import Watch

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inside diffusers

GUIDED = {"guidance_scale": 2.0, "height": 32, "width": 32}


class FlowMatchHeunDiscreteScheduler(diffusers.FlowMatchHeunDiscreteScheduler):
    """Takes what FluxPipeline gives; its own grid does not depend on it."""

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None):
        super().set_timesteps(num_inference_steps or len(sigmas), device)


def source_of(name: str, request: pytest.FixtureRequest) -> Any:
    return name if name.startswith("zoo:") else request.getfixturevalue(name)


def timestep_of(inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> float:
    """What a denoiser was told, by position or by name."""
    args, kwargs = inputs
    return float(torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1]).flatten()[0])


def check_against_the_pipeline(watch: Watch, calls: list[Any]) -> None:
    """Every stored call entered the denoiser just so, and gives the answer that it gave then."""
    for call in calls:
        assert torch.equal(watch.replay(call), watch.answer_to(call))


@pytest.mark.parametrize(
    ("source", "fields", "branches"),
    [
        ("zoo:digits-unet", {}, {"none": 6}),
        ("zoo:digits-dit", {}, {"both": 6}),
        ("sd_folder", GUIDED, {"both": 6}),
        ("flux_folder", GUIDED, {"cond": 6, "uncond": 6}),
        ("video_folder", {"guidance_scale": 2.0, "num_frames": 2}, {"both": 6}),
    ],
)
def test_each_branch_is_kept_evenly_and_replays_bit_for_bit(
    source: str, fields: dict[str, Any], branches: dict[str, int], request: pytest.FixtureRequest, calibrated, watch
) -> None:
    found = open_calibration(calibrated(source_of(source, request), **fields))
    calls = list(found)
    assert list(found.record.branches.values()) == [branches]
    assert len(found) == len(calls) == sum(branches.values())  # 3 timesteps of 2 batches, for each branch
    assert [call.state.call for call in calls if call.state.evaluation == 0] == [0, 2, 4] * 2
    assert {call.state.calls for call in calls} == {6}
    assert [len(shard.samples) for shard in found.record.shards] == [2, 1]
    assert [sample.seed for sample in found.record.samples] == list(seed_stream("calibration", 0, 3))
    check_against_the_pipeline(watch, calls)


@pytest.mark.parametrize(
    ("source", "scheduler", "calls"),
    [
        ("sd_folder", "DDIMScheduler", 5),
        ("sd_folder", "PNDMScheduler", 14),
        ("sd_folder", "DPMSolverMultistepScheduler", 5),
        ("sd_folder", "EulerDiscreteScheduler", 5),
        ("sd_folder", "HeunDiscreteScheduler", 9),
        ("flux_folder", "FlowMatchEulerDiscreteScheduler", 5),
        ("flux_folder", "FlowMatchHeunDiscreteScheduler", 9),
    ],
)
def test_each_scheduler_gives_the_denoiser_the_stored_timestep(
    source: str, scheduler: str, calls: int, request: pytest.FixtureRequest, calibrated, watch
) -> None:
    watch.scheduler = globals().get(scheduler) or getattr(diffusers, scheduler)
    folder = calibrated(source_of(source, request), samples=2, steps=5, strategy="every-step", timesteps=None, **GUIDED)
    found = open_calibration(folder)
    stored, branches = list(found), 2 if source == "flux_folder" else 1
    assert found.schedule.scheduler == scheduler
    assert [call.state.call for call in stored] == [call for call in range(calls) for _ in range(branches)]
    scale = 1000 if source == "flux_folder" else 1
    received = [timestep_of(seen.inputs) * scale for seen in watch.seen[branches:]]  # one call came before, to look
    told = [timestep_of((call.args, call.kwargs)) * scale for call in stored]
    assert told == received
    assert told == pytest.approx([call.state.timestep for call in stored], rel=1e-5)
    assert told[::branches] == pytest.approx(found.schedule.timesteps, rel=1e-5)
    check_against_the_pipeline(watch, stored)
    if branches == 1:
        pairs = list(zip(stored, stored[::-1], strict=True))
        shuffled = [watch.pipe.unet(a.args[0], b.args[1], **a.kwargs)[0] for a, b in pairs]
        assert not all(torch.equal(one, watch.answer_to(call)) for one, call in zip(shuffled, stored, strict=True))


def test_a_drawn_call_ends_the_run_and_leaves_no_run_behind(unet_folder, calibrated, watch) -> None:
    found = open_calibration(calibrated(unet_folder, samples=12, steps=8, strategy="ndtc", timesteps=None))
    shards = found.record.shards
    assert all(len(shard.calls) == 1 for shard in shards)
    assert sorted(sample for shard in shards for sample in shard.samples) == list(range(12))
    assert len(watch.seen) == 1 + sum(shard.calls[0] + 1 for shard in shards)  # none after the kept one
    assert current_run() is None
    assert not [hook for hook in watch.pipe.unet._forward_pre_hooks.values() if "dacc.calibrate" in str(hook)]
    for shard, call in zip(shards, found, strict=True):
        assert (call.state.call,) == shard.calls
        assert call.args[0].shape[0] == len(shard.samples)
    check_against_the_pipeline(watch, list(found))


def test_a_sample_does_not_depend_on_the_samples_beside_it(unet_folder, calibrated) -> None:
    alone, beside = (
        list(open_calibration(calibrated(unet_folder, _output=f"set-{size}", samples=2, batch_size=size)))
        for size in (1, 2)
    )
    expected = torch.cat([call.args[0] for call in alone if call.state.call == 4])
    found = next(call.args[0] for call in beside if call.state.call == 4)
    torch.testing.assert_close(expected, found, rtol=1e-3, atol=1e-3)


def test_prompts_and_negative_prompts_are_dealt_in_turn(sd_folder, calibrated) -> None:
    fields = {"prompts": ("a red circle", "a blue square"), "negative_prompt": ("small", "large"), **GUIDED}
    record = open_calibration(calibrated(sd_folder, timesteps=1, **fields)).record
    told = [(sample.prompt, sample.negative_prompt) for sample in record.samples]
    assert told == [("a red circle", "small"), ("a blue square", "large"), ("a red circle", "small")]


def test_neutral_prompts_are_a_notice_and_repeated_tensors_are_stored_once(sd_folder, calibrated) -> None:
    reporter = silent()
    folder = calibrated(sd_folder, timesteps=2, _reporter=reporter, **GUIDED)
    found = open_calibration(folder)
    assert "--prompts FILE" in reporter.notices[0]
    assert list(found.record.notices) == reporter.notices
    first, second = list(found)[:2]
    assert first.kwargs["encoder_hidden_states"] is second.kwargs["encoder_hidden_states"]


def test_a_budget_lowers_the_samples_in_whole_batches(unet_folder, calibrated) -> None:
    whole = open_calibration(calibrated(unet_folder, samples=8)).record
    size = sum(shard.size for shard in whole.shards)
    reporter = silent()
    folder = calibrated(unet_folder, _output="less", samples=8, budget_gb=0.7 * size / 1e9, _reporter=reporter)
    record = open_calibration(folder).record
    assert (len(record.samples), record.recipe["samples"]) == (4, 4)
    assert sum(shard.size for shard in record.shards) <= 0.7 * size
    assert [shard.sha256 for shard in record.shards] == [shard.sha256 for shard in whole.shards[:2]]
    assert "8 samples" in reporter.notices[0]
    assert "only 4" in reporter.notices[0]


def test_fewer_drawn_samples_are_the_first_of_all(unet_folder, calibrated) -> None:
    options = {"strategy": "ndtc", "timesteps": None, "steps": 4}
    whole = open_calibration(calibrated(unet_folder, samples=8, **options)).record
    largest = max(whole.shards, key=lambda shard: len(shard.samples))
    budget = 4.5 * largest.size / len(largest.samples) / 1e9
    less = open_calibration(calibrated(unet_folder, _output="less", samples=8, budget_gb=budget, **options)).record

    def drawn(record: Any) -> list[tuple[int, tuple[int, ...]]]:
        return sorted((sample, shard.calls) for shard in record.shards for sample in shard.samples)

    assert drawn(less) == drawn(whole)[:4]


def test_a_budget_below_one_batch_is_refused(unet_folder, calibrated, tmp_path) -> None:
    with pytest.raises(ConfigError, match="--store-dtype bfloat16"):
        calibrated(unet_folder, budget_gb=1e-6)
    with pytest.raises(ConfigError, match="a batch of 2 samples takes"):
        calibrated(unet_folder, samples=2, batch_size=8, budget_gb=1e-6)
    assert not list(tmp_path.iterdir())


def test_a_pipeline_that_breaks_down_is_refused_with_the_call(unet_folder, calibrated, watch, tmp_path) -> None:
    def break_(pipe: Any) -> None:
        pipe.unet.conv_out.bias.data.fill_(float("nan"))

    watch.before = break_
    with pytest.raises(CalibrationError, match="argument 0 of call 2 of unet holds NaN"):
        calibrated(unet_folder)
    assert not list(tmp_path.iterdir())


def test_sixteen_bits_are_half_the_size_and_leave_timesteps_alone(flux_folder, calibrated) -> None:
    exact = open_calibration(calibrated(flux_folder, _output="exact", **GUIDED))
    cast = open_calibration(calibrated(flux_folder, _output="cast", store_dtype="bfloat16", **GUIDED))
    for one, other in zip(exact, cast, strict=True):
        hidden, rounded = one.kwargs["hidden_states"], other.kwargs["hidden_states"]
        assert rounded.dtype == hidden.dtype == torch.float32
        assert torch.equal(rounded, hidden.bfloat16().float())
        for name in ("timestep", "img_ids", "txt_ids", "pooled_projections"):
            assert torch.equal(one.kwargs[name], other.kwargs[name])
    assert exact.record.id != cast.record.id
