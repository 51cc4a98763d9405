from __future__ import annotations

import warnings
from typing import Any

import diffusers
import pytest
import torch

import dacc
from dacc.cache.config import METHODS
from dacc.cache.search import search_component
from dacc.core.cache_plan import CachePlan, CorrectionId
from dacc.core.reporter import Reporter
from dacc.core.tensor_file import content_hash
from dacc.runtime.cached import CachePlanWarning
from dacc.runtime.clockwork import attach_clock
from dacc.runtime.correction import Correction
from dacc.runtime.installed import install_plan_, no_cache
from dacc.runtime.request import RunRequest
from dacc.runtime.trajectory import sample

from .cache_plans import CUT, ENCODER, grid_of, plan_for

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 inside diffusers
CODES = "CRRRCRRC"
SEARCH = {"macs_ratio": 0.95, "steps": 8, "samples": 1, "measure": "never", "method": "encoder"}
GUIDED = {"prompts": ("a red circle", "a blue square"), "guidance_scale": 4.0}
REQUESTS: dict[str, dict[str, Any]] = {
    "unet_pipeline": {},
    "sd_pipeline": GUIDED,
    "video_pipeline": {**GUIDED, "num_frames": 3},
}


class Rows:
    """How many rows every evaluation of a module had."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.seen: list[int] = []
        module.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _: Any, args: Any, kwargs: Any) -> None:
        self.seen.append(len(kwargs.get("hidden_states", args[0] if args else None)))


def request_of(kind: str, **fields: Any) -> RunRequest:
    return RunRequest(**{"seeds": (1, 2), "num_inference_steps": 8, "batch_size": 2, **REQUESTS[kind], **fields})


def install(pipe: Any, ahead: int, codes: str = CODES, **fields: Any) -> CachePlan:
    fields = {"grid": grid_of(pipe, 8), "rule": "exact", **fields}
    plan = plan_for(pipe, {ENCODER: codes}, decode_ahead=ahead, **fields)
    install_plan_(pipe, "unet", plan)
    return plan


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """But for the order of sums, which the size of a batch may change."""
    assert (found - expected).norm() < 1e-5 * expected.norm()


def quietly(pipe: Any, request: RunRequest) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error", CachePlanWarning)
        return sample(pipe, request).latents


@pytest.mark.parametrize("kind", REQUESTS)
@pytest.mark.parametrize("ahead", [2, 9])
def test_calls_decoded_at_once_give_what_they_give_one_by_one(request, kind, ahead):
    pipe = request.getfixturevalue(kind)()
    install(pipe, 1)
    rows = Rows(pipe.unet.up_blocks[0])
    expected = quietly(pipe, request_of(kind))
    one = rows.seen[0]
    assert rows.seen == [one] * 8
    install(pipe, ahead)
    rows.seen.clear()
    found = quietly(pipe, request_of(kind))
    wide = [1, 2, 1, 1, 2, 1] if ahead == 2 else [1, 3, 1, 2, 1]
    assert rows.seen == [one * count for count in wide]
    assert_near(found, expected)
    with no_cache(pipe):
        assert not torch.allclose(sample(pipe, request_of(kind)).latents, expected, atol=1e-3)


@pytest.mark.parametrize(
    "name", ["DDPMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"]
)
def test_solvers_step_in_between_as_ever(sd_pipeline, name):
    pipe = sd_pipeline()
    settings = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    pipe.register_modules(scheduler=getattr(diffusers, name)(**settings))
    attach_clock(pipe)
    calls = len(grid_of(pipe, 8).timesteps)
    latents = []
    for ahead in (1, 4):
        install(pipe, ahead, codes=(CODES * 2)[:calls])
        latents.append(quietly(pipe, request_of("sd_pipeline")))
    assert_near(*latents)


def test_each_call_corrects_what_it_reuses(unet_pipeline):
    pipe = unet_pipeline()
    torch.manual_seed(0)
    channels = {"conv_in/0": 16, "mid_block/0": 32}
    channels |= {f"down_blocks.{block}/{place}": width for block, place, width in DOWN}
    tables = {f"encoder/{name}.scale": 1 + 0.1 * torch.randn(8, count) for name, count in channels.items()}
    tables |= {f"encoder/{name}.shift": 0.1 * torch.randn(8, count) for name, count in channels.items()}
    latents = []
    for ahead in (1, 3):
        plan = plan_for(pipe, {ENCODER: CODES}, decode_ahead=ahead, rule="exact")
        plan = plan.model_copy(update={"correction": CorrectionId(sha256=content_hash(tables))})
        install_plan_(pipe, "unet", plan, Correction(tables, plan))
        latents.append(quietly(pipe, request_of("unet_pipeline")))
    assert_near(*latents)
    install(pipe, 1)
    assert not torch.allclose(sample(pipe, request_of("unet_pipeline")).latents, latents[0], atol=1e-3)


DOWN = [(0, 0, 16), (0, 1, 16), (0, 2, 16), (1, 0, 32), (1, 1, 32)]  # block, place in what it gives, channels


def drive(pipe: Any, conditions: Any) -> torch.Tensor:
    """The loop of a pipeline, written out; `conditions` gives the other inputs of each call."""
    pipe.scheduler.set_timesteps(8)
    latents = torch.randn(2, 4, 16, 16, generator=torch.manual_seed(0))
    with torch.no_grad():
        for number, timestep in enumerate(pipe.scheduler.timesteps):
            given = pipe.scheduler.scale_model_input(latents, timestep)
            output = pipe.unet(given, **{"timestep": timestep, **conditions(number)}).sample
            latents = pipe.scheduler.step(output, timestep, latents).prev_sample
    return latents


@pytest.mark.parametrize("changing", ["text", "timestep", "rows"])
def test_where_inputs_are_not_as_supposed_calls_are_decoded_one_by_one_with_a_warning(sd_pipeline, changing):
    pipe = sd_pipeline()
    text = torch.randn(2, 16, 32, generator=torch.manual_seed(1))

    def conditions(number: int) -> dict[str, Any]:
        if changing == "timestep":
            return {"encoder_hidden_states": text, "timestep": 999 - number}
        if changing == "rows":
            return {"encoder_hidden_states": text, "cross_attention_kwargs": {"unknown": torch.zeros(3)}}
        return {"encoder_hidden_states": text * (1 + number // 2)}

    latents = []
    for ahead in (1, 3):
        install(pipe, ahead)
        if ahead == 1:
            latents.append(drive(pipe, conditions))
            continue
        with pytest.warns(CachePlanWarning, match="decodes them one by one"):
            latents.append(drive(pipe, conditions))
    assert_near(*latents)


def test_scales_of_every_call_are_not_mixed_in_one_batch(unet_pipeline):
    pipe = unet_pipeline()
    install(pipe, 3)
    pipe.unet.up_blocks[0].resnets[0].step_table = object()
    rows = Rows(pipe.unet.up_blocks[0])
    with pytest.warns(CachePlanWarning, match="scales of their own for every call"):
        sample(pipe, request_of("unet_pipeline"))
    assert rows.seen == [2] * 8


def test_a_search_tells_that_scales_of_every_call_keep_calls_apart(unet_pipeline):
    reporter = Reporter(quiet=True)
    config = dacc.SearchCacheConfig(**SEARCH, settings={"ahead": 5})
    pipe = unet_pipeline()
    attach_clock(pipe)
    pipe.unet.up_blocks[0].resnets[0].step_table = object()
    method = METHODS.load("encoder")
    request = RunRequest(seeds=(1,), num_inference_steps=8)
    found = search_component(pipe, "unet", config, method, request, "0" * 64, reporter)
    assert found.record.plan.decode_ahead == 1
    assert any("one by one" in notice for notice in reporter.notices)


def test_only_the_encoder_of_a_unet_is_decoded_at_once(unet_pipeline):
    with pytest.raises(ValueError, match="decoded at once"):
        plan_for(unet_pipeline(), {CUT: CODES}, decode_ahead=2)


def test_a_plan_without_it_is_written_as_before(unet_pipeline):
    plan = plan_for(unet_pipeline(), {ENCODER: CODES})
    assert "decode_ahead" not in plan.model_dump()
    wide = plan.model_copy(update={"decode_ahead": 3})
    assert CachePlan(**wide.model_dump()) == wide
    assert wide.sha256() != plan.sha256()


def test_a_search_writes_it_into_the_plan(unet_folder, tmp_path):
    config = dacc.SearchCacheConfig(**SEARCH, settings={"ahead": 5})
    bundle = dacc.search_cache(unet_folder, config, output=tmp_path / "out", device="cpu")
    pipe: Any = dacc.load(bundle, device="cpu")
    rows = Rows(pipe.unet.up_blocks[0])
    quietly(pipe, request_of("unet_pipeline"))
    assert sum(rows.seen) == 16
    assert max(rows.seen) > 2
