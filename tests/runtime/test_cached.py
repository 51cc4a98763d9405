from __future__ import annotations

import contextvars
import gc
import threading
import weakref
from typing import Any

import diffusers
import pytest
import torch
from torch.utils._pytree import tree_leaves

import dacc
from dacc.core.cache_plan import UnetCut
from dacc.core.errors import ConfigError, ModelError, UnsupportedError
from dacc.core.schedule_id import schedule_id
from dacc.runtime.cache_units import layout_of
from dacc.runtime.cached import CachedUnits, CachePlanWarning
from dacc.runtime.clock import current_run, end_run, run_storage, running_scheduler
from dacc.runtime.clockwork import attach_clock
from dacc.runtime.installed import install_plan_, installed_units, no_cache, remove_plans_
from dacc.runtime.request import RunRequest
from dacc.runtime.trajectory import call_pipeline, capture_calls, sample

from .cache_plans import BODY, CUT, ENCODER, OUTPUT, blocks, denoiser_of, grid_of, module, plan_for

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 inside diffusers
FLUX = ("transformer_blocks", "single_transformer_blocks")
UNITS = {
    "unet cut at layer 0": ("unet_pipeline", CUT),
    "unet cut at layer 1": ("unet_pipeline", UnetCut(id="deep", block=0, layer=1)),
    "unet cut at an attention": ("unet_pipeline", UnetCut(id="deep", block=1, layer=0)),
    "unet cut at the middle": ("unet_pipeline", UnetCut(id="deep", block=1, layer=1)),
    "unet encoder": ("unet_pipeline", ENCODER),
    "unet body": ("unet_pipeline", BODY),
    "conditional cut": ("sd_pipeline", CUT),
    "conditional cut at cross attention": ("sd_pipeline", UnetCut(id="deep", block=1, layer=0)),
    "conditional encoder": ("sd_pipeline", ENCODER),
    "conditional body": ("sd_pipeline", BODY),
    "cut of clips": ("video_pipeline", CUT),
    "cut of clips at cross attention": ("video_pipeline", UnetCut(id="deep", block=1, layer=0)),
    "cut of clips at the last layer": ("video_pipeline", UnetCut(id="deep", block=0, layer=1)),
    "encoder of clips": ("video_pipeline", ENCODER),
    "body of clips": ("video_pipeline", BODY),
    "motion module": ("video_pipeline", module("up_blocks.1.motion_modules.0")),
    "residual of a block": ("dit_pipeline", blocks(1, 2)),
    "output of blocks": ("dit_pipeline", blocks(0, 2, store="output")),
    "attention": ("dit_pipeline", module("transformer_blocks.1.attn1")),
    "feed-forward": ("dit_pipeline", module("transformer_blocks.0.ff")),
    "two streams": ("flux_pipeline", blocks(0, 2, *FLUX)),
    "outputs of two streams": ("flux_pipeline", blocks(0, 1, *FLUX, store="output")),
    "joint attention": ("flux_pipeline", module("transformer_blocks.0.attn")),
    "output": ("unet_pipeline", OUTPUT),
    "conditional output": ("sd_pipeline", OUTPUT),
    "output of clips": ("video_pipeline", OUTPUT),
    "output of a transformer": ("dit_pipeline", OUTPUT),
    "output of two streams": ("flux_pipeline", OUTPUT),
}
EVERY_UNIT = pytest.mark.parametrize(("kind", "unit"), UNITS.values(), ids=UNITS)


def request_of(pipe: Any, **fields: Any) -> RunRequest:
    sized = {"height": 32, "width": 32} if isinstance(pipe, diffusers.FluxPipeline) else {}
    if isinstance(pipe, diffusers.AnimateDiffPipeline):
        sized = {"num_frames": 3}
    return RunRequest(**{"seeds": (1, 2), "num_inference_steps": 4, **sized, **fields})


def installed(pipe: Any, codes: Any, **fields: Any) -> CachedUnits:
    if isinstance(pipe, diffusers.FluxPipeline) and "grid" not in fields:
        fields["grid"] = grid_of(pipe, len(next(iter(dict(codes).values()))))
    return install_plan_(pipe, denoiser_of(pipe)[0], plan_for(pipe, codes, **fields))


class Recorder:
    """The calls of the run in which a module runs; torch's own hooks see a module that gives back what it kept, so the
    module to watch is one inside."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.calls: list[int] = []
        module.register_forward_hook(lambda *_: self.calls.append(state.call if (state := current_run()) else -1))


@EVERY_UNIT
def test_a_plan_that_computes_everything_changes_no_bit(request, kind, unit):
    pipe = request.getfixturevalue(kind)()
    before = sample(pipe, request_of(pipe))
    installed(pipe, {unit: "CCCC"}, rule="exact", grid=run_grid(pipe))
    after = sample(pipe, request_of(pipe))
    assert torch.equal(before.latents, after.latents)
    assert torch.equal(before.images, after.images)


def run_grid(pipe: Any, request: RunRequest | None = None) -> Any:
    """The grid that the pipeline itself asks for."""
    found: list[Any] = []
    attach_clock(pipe)
    call_pipeline(pipe, request or request_of(pipe), [0], on_step=lambda _: found.append(running_scheduler(pipe)))
    return schedule_id(found[0])


@EVERY_UNIT
def test_reuse_changes_the_result_and_without_the_plan_it_is_as_before(request, kind, unit):
    pipe = request.getfixturevalue(kind)()
    before = sample(pipe, request_of(pipe)).latents
    installed(pipe, {unit: "CRRR"}, rule="exact", grid=run_grid(pipe))
    assert not torch.equal(sample(pipe, request_of(pipe)).latents, before)
    with no_cache(pipe):
        assert torch.equal(sample(pipe, request_of(pipe)).latents, before)
    denoiser = denoiser_of(pipe)[1]
    remove_plans_(pipe)
    assert installed_units(denoiser) is None
    assert denoiser.forward.__func__ is type(denoiser).forward
    assert not hasattr(type(pipe), "_dacc_cached")
    assert torch.equal(sample(pipe, request_of(pipe)).latents, before)


@EVERY_UNIT
def test_reusing_on_the_same_input_gives_the_same_output(request, kind, unit):
    """Bit for bit, save for residuals, which are a difference added again."""
    pipe = request.getfixturevalue(kind)()
    call = capture_calls(pipe, request_of(pipe))[0]
    denoiser = denoiser_of(pipe)[1]
    units, values = CachedUnits(denoiser, [unit]), {}
    with units.recording(values):
        full = call.replay(denoiser)[0]
    with units.reusing(values, [unit.id]):
        again = call.replay(denoiser)[0]
    if getattr(unit, "store", "output") == "output":
        assert torch.equal(full, again)
    else:
        torch.testing.assert_close(full, again, rtol=1e-4, atol=1e-6)
        assert torch.equal(full, call.replay(denoiser)[0])


def test_what_a_model_adds_between_the_blocks_of_a_range_counts_once(flux_pipeline):
    pipe = flux_pipeline()
    call, transformer = capture_calls(pipe, request_of(pipe))[0], pipe.transformer
    added = torch.randn(1, 1, 32, generator=torch.manual_seed(0))
    call.kwargs.update(controlnet_block_samples=[added], controlnet_single_block_samples=[added])
    units, values = CachedUnits(transformer, [blocks(0, 2, *FLUX)]), {}
    with units.recording(values):
        full = call.replay(transformer)[0]
    with units.reusing(values, ["body"]):
        torch.testing.assert_close(call.replay(transformer)[0], full, rtol=1e-4, atol=1e-6)


ADAPTED = {
    "cut": CUT,
    "cut at the last layer": UnetCut(id="deep", block=1, layer=1),
    "encoder": ENCODER,
    "body": BODY,
    "output": OUTPUT,
    "middle": module("mid_block"),
    "last layer of a block": module("down_blocks.0.downsamplers.0"),
}


@pytest.mark.parametrize("unit", ADAPTED.values(), ids=ADAPTED)
@pytest.mark.parametrize("down", [("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnDownBlock2D", "DownBlock2D")])
@torch.no_grad()
def test_what_an_adapter_adds_in_place_never_reaches_what_is_kept(unit, down):
    torch.manual_seed(0)
    sizes = {"block_out_channels": (16, 32), "norm_num_groups": 8, "cross_attention_dim": 16, "attention_head_dim": 4}
    up = tuple(name.replace("Down", "Up") for name in reversed(down))
    unet = diffusers.UNet2DConditionModel(down_block_types=down, up_block_types=up, layers_per_block=1, **sizes).eval()
    first = 8 if down[0] == "DownBlock2D" else 16  # one adds behind its sampler, the other before
    added = [torch.randn(1, channels, size, size) for channels, size in ((16, first), (32, 8), (32, 8))]
    inputs = {"sample": torch.randn(1, 4, 16, 16), "timestep": 5, "encoder_hidden_states": torch.randn(1, 6, 16)}
    plain = unet(**inputs, down_intrablock_additional_residuals=list(added))[0]
    units, values = CachedUnits(unet, [unit]), {}
    with units.recording(values):
        assert torch.equal(unet(**inputs, down_intrablock_additional_residuals=list(added))[0], plain)
    for _ in range(2):
        with units.reusing(values, [unit.id]):
            assert torch.equal(unet(**inputs, down_intrablock_additional_residuals=list(added))[0], plain)


@pytest.mark.parametrize(
    "unit", [module("mid_block"), ENCODER, UnetCut(id="deep", block=1, layer=0), CUT, BODY, OUTPUT]
)
@torch.no_grad()
def test_what_free_u_scales_in_place_never_reaches_what_is_kept(unit):
    torch.manual_seed(0)
    sizes = {"block_out_channels": (16, 32), "norm_num_groups": 8, "cross_attention_dim": 16, "attention_head_dim": 4}
    kinds = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    kinds |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    unet = diffusers.UNet2DConditionModel(**kinds, layers_per_block=1, **sizes).eval()
    inputs = {"sample": torch.randn(1, 4, 16, 16), "timestep": 5, "encoder_hidden_states": torch.randn(1, 6, 16)}
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    plain = unet(**inputs)[0]
    units, values = CachedUnits(unet, [unit]), {}
    with units.recording(values):
        assert torch.equal(unet(**inputs)[0], plain)
    for _ in range(2):
        with units.reusing(values, [unit.id]):
            assert torch.equal(unet(**inputs)[0], plain)


def test_a_flow_that_reuses_its_output_takes_longer_steps(flux_pipeline):
    """Slow and obvious: Euler's steps by hand, from one computed call to the next."""
    pipe = flux_pipeline()
    grid, request = run_grid(pipe), request_of(pipe)
    calls = capture_calls(pipe, request)
    installed(pipe, {OUTPUT: "CRRC"}, rule="exact", grid=grid)
    found = sample(pipe, request).latents
    remove_plans_(pipe)
    sigmas, transformer = [*grid.sigmas, 0.0][:5], pipe.transformer
    start, last = calls[0], calls[3]
    velocity = start.replay(transformer)[0]
    before_last = start.kwargs["hidden_states"] + (sigmas[3] - sigmas[0]) * velocity
    last.kwargs["hidden_states"] = before_last
    expected = before_last + (sigmas[4] - sigmas[3]) * last.replay(transformer)[0]
    torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)


def test_a_pipeline_that_changes_an_output_in_place_leaves_what_is_kept_alone(unet_pipeline):
    pipe = unet_pipeline()
    call = capture_calls(pipe, request_of(pipe))[0]
    units, values = CachedUnits(pipe.unet, [OUTPUT]), {}
    with units.recording(values):
        plain = call.replay(pipe.unet)[0].clone()
        call.replay(pipe.unet)[0].zero_()
    for _ in range(2):
        with units.reusing(values, ["output"]):
            again = call.replay(pipe.unet)[0]
        assert torch.equal(again, plain)
        again.zero_()


def test_a_cut_feeds_the_fresh_layers_what_the_deep_ones_gave_before(unet_pipeline):
    """Slow and obvious: the last up layer by hand, on a fresh first convolution and an old deep state."""
    pipe = unet_pipeline()
    unet, calls = pipe.unet, capture_calls(pipe, request_of(pipe))
    units, values = CachedUnits(unet, [CUT]), {}
    with units.recording(values):
        calls[0].replay(unet)
    with units.reusing(values, ["deep"]):
        found = calls[3].replay(unet)[0]
    deep = values["deep", "up_blocks.1.resnets.0"]
    sample, timestep = calls[3].args
    with torch.no_grad():
        emb = unet.time_embedding(unet.time_proj(timestep.expand(len(sample))))
        hidden = unet.up_blocks[1].resnets[1](torch.cat([deep, unet.conv_in(sample)], dim=1), emb)
        expected = unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))
    assert torch.equal(found, expected)


def test_skipped_modules_do_not_run_and_all_others_do(dit_pipeline):
    pipe = dit_pipeline()
    first, second = (Recorder(block.attn1) for block in pipe.transformer.transformer_blocks)
    installed(pipe, {blocks(1, 2): "CRRC"})
    sample(pipe, request_of(pipe))
    assert first.calls == [0, 1, 2, 3]
    assert second.calls == [0, 3]


def test_nested_units_follow_the_outer_one(dit_pipeline):
    pipe = dit_pipeline()
    recorder = Recorder(pipe.transformer.transformer_blocks[1].ff.net[0])
    installed(pipe, {blocks(0, 2): "CRCC", module("transformer_blocks.1.ff"): "CCRC"})
    sample(pipe, request_of(pipe))
    assert recorder.calls == [0, 3]


NESTED = {
    "cut in a cut": ("unet_pipeline", CUT, UnetCut(id="inner", block=0, layer=1)),
    "middle of an encoder": ("unet_pipeline", ENCODER, module("mid_block")),
    "encoder in a body": ("unet_pipeline", BODY, ENCODER),
    "first block of a range": ("dit_pipeline", blocks(0, 2), module("transformer_blocks.0")),
    "last block of a range": ("dit_pipeline", blocks(0, 2), module("transformer_blocks.1")),
    "range in a range": ("dit_pipeline", blocks(0, 2), blocks(1, 2).model_copy(update={"id": "inner"})),
}


@pytest.mark.parametrize(("kind", "outer", "inner"), NESTED.values(), ids=NESTED)
def test_an_outer_unit_keeps_what_a_skipped_inner_one_gave(request, kind, outer, inner):
    """The same input at every call, so that whatever is reused nothing changes."""
    pipe = request.getfixturevalue(kind)()
    call, denoiser = capture_calls(pipe, request_of(pipe))[0], denoiser_of(pipe)[1]
    leaves = {path: last_leaf(denoiser, path) for path in layout_of(denoiser, outer).skipped}
    owned = {path: Recorder(leaf) for path, leaf in leaves.items() if leaf is not denoiser.get_submodule(path)}
    inside = layout_of(denoiser, inner).skipped
    installed(pipe, {outer: "CCRR", inner: "CRRR"})
    pipe.scheduler.set_timesteps(4)
    outputs = []
    with torch.no_grad():
        for timestep in pipe.scheduler.timesteps:
            outputs.append(denoiser(*call.args, **call.kwargs)[0])
            pipe.scheduler.step(torch.zeros(1), timestep, torch.zeros(1))
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-6)
    for path, recorder in owned.items():
        assert sorted(set(recorder.calls)) == ([0] if path in inside else [0, 1]), path
    hooked = {path: denoiser.get_submodule(path) for path in {*leaves, *inside}}
    installed(pipe, {outer: "CCRR", inner: "CRRR"})
    remove_plans_(pipe)
    for path, own in hooked.items():  # also where both units have a hook
        assert getattr(own.forward, "__func__", None) is type(own).forward, path


def last_leaf(denoiser: torch.nn.Module, path: str) -> torch.nn.Module:
    """The last layer inside a module; a DiT reads the first one of its first block outside of it too."""
    modules = reversed(list(denoiser.get_submodule(path).modules()))
    return next(module for module in modules if isinstance(module, torch.nn.Linear | torch.nn.Conv2d))


@pytest.mark.parametrize(
    "name", ["HeunDiscreteScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]
)
def test_plans_count_the_calls_of_every_solver(unet_pipeline, name):
    pipe = unet_pipeline()
    settings = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    pipe.register_modules(scheduler=getattr(diffusers, name)(**settings))
    attach_clock(pipe)
    calls = len(grid_of(pipe, 4).timesteps)
    codes = ("CRR" * 4)[:calls]
    recorder = Recorder(pipe.unet.mid_block.resnets[0])
    install_plan_(pipe, "unet", plan_for(pipe, {CUT: codes}, grid=grid_of(pipe, 4), rule="exact"))
    latents = torch.randn(2, 1, 16, 16, generator=torch.manual_seed(0))
    pipe.scheduler.set_timesteps(4)
    with torch.no_grad():
        for timestep in pipe.scheduler.timesteps:
            entering = pipe.scheduler.scale_model_input(latents, timestep)
            latents = pipe.scheduler.step(pipe.unet(entering, timestep).sample, timestep, latents).prev_sample
    assert recorder.calls == [call for call, code in enumerate(codes) if code == "C"]


def test_each_guidance_branch_has_values_of_its_own(flux_pipeline):
    """Flux evaluates the branches apart; swapping them would change the first reuse."""
    pipe = flux_pipeline()
    request = request_of(pipe, guidance_scale=3.0, prompts=("a red circle",), seeds=(1,))
    before = capture_calls(pipe, request)
    assert [call.state.evaluation for call in before[:2]] == [0, 1]
    units = installed(pipe, {blocks(0, 2, *FLUX, store="output"): "CRRC"}, grid=run_grid(pipe))
    expected = {}
    for call in before[:2]:
        with units.recording(values := {}):
            call.replay(pipe.transformer)
        expected[call.state.evaluation] = values
    seen: list[Any] = []

    def keep(owner: Any, frame: Any, row: Any) -> None:
        seen.append({key: value[0].clone() for key, value in frame.values.items()})

    units.close = keep.__get__(units)  # type: ignore[method-assign]
    sample(pipe, request)
    for evaluation in (0, 1):
        for key, value in expected[evaluation].items():
            assert torch.equal(seen[evaluation][key], value[0])
    assert not torch.equal(*[next(iter(values.values())) for values in seen[:2]])


def test_repeated_runs_and_other_step_counts_do_not_meet(unet_pipeline):
    pipe = unet_pipeline()
    installed(pipe, {CUT: "CRRCRR"})
    request = request_of(pipe, num_inference_steps=6)
    first = sample(pipe, request).latents
    with pytest.warns(CachePlanWarning, match="searched for 6 DDIMScheduler calls; this run of 9"):
        sample(pipe, request_of(pipe, num_inference_steps=9))
    assert torch.equal(sample(pipe, request).latents, first)


def test_a_run_on_another_grid_tells_once_what_it_costs(unet_pipeline):
    pipe = unet_pipeline()
    recorder = Recorder(pipe.unet.mid_block.resnets[0])
    installed(pipe, {CUT: "CRRCRR"})
    with pytest.warns(CachePlanWarning) as told:
        drive(pipe, 10)
    computed = len(recorder.calls)
    assert f"with {computed * 10 + (10 - computed) * 4}% of the multiply-accumulates" in str(told[0].message)
    drive(pipe, 10)  # a second warning would be an error


def test_a_scheduler_that_takes_the_place_of_another_runs_the_plan_too(unet_pipeline):
    pipe = unet_pipeline()
    recorder = Recorder(pipe.unet.mid_block.resnets[0])
    installed(pipe, {CUT: "CRCRCRCR"})
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe(batch_size=1, num_inference_steps=8)
    assert recorder.calls == [0, 2, 4, 6]
    assert run_storage() is None


def test_a_pipeline_that_shares_the_denoiser_under_a_scheduler_of_its_own_is_told_so(unet_pipeline):
    pipe = unet_pipeline()
    recorder = Recorder(pipe.unet.mid_block.resnets[0])
    installed(pipe, {CUT: "CRCR"})
    other = diffusers.DDIMPipeline(unet=pipe.unet, scheduler=diffusers.DDIMScheduler.from_config(pipe.scheduler.config))
    other.set_progress_bar_config(disable=True)
    with pytest.warns(CachePlanWarning, match="outside of a run of the scheduler.*everything is computed") as told:
        other(batch_size=1, num_inference_steps=4)
    assert len(recorder.calls) == 4
    assert len(told) == 1
    with no_cache(pipe):
        other(batch_size=1, num_inference_steps=4)  # a warning would be an error


def test_a_short_run_goes_without_the_plan_and_says_so(unet_pipeline):
    pipe = unet_pipeline()
    before = sample(pipe, request_of(pipe, num_inference_steps=3)).latents
    installed(pipe, {CUT: "CR" * 5})
    with pytest.warns(CachePlanWarning, match="too short"):
        assert torch.equal(sample(pipe, request_of(pipe, num_inference_steps=3)).latents, before)


def test_an_exact_plan_refuses_another_grid(unet_pipeline):
    pipe = unet_pipeline()
    installed(pipe, {CUT: "CR" * 5}, rule="exact")
    with pytest.raises(ConfigError, match="10 DDIMScheduler calls, running 9 on another grid"):
        sample(pipe, request_of(pipe, num_inference_steps=9))


def drive(pipe: Any, steps: int, *, start: int = 0, rows: tuple[int, ...] = ()) -> torch.Tensor:
    """The loop of a pipeline, written out; `rows` says how many samples each call has."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps)
    if start:
        scheduler.set_begin_index(start) if hasattr(scheduler, "set_begin_index") else None
    latents = torch.randn(2, 1, 16, 16, generator=torch.manual_seed(0))
    with torch.no_grad():
        for number, timestep in enumerate(scheduler.timesteps[start:]):
            latents = latents[: rows[number]] if rows else latents
            scheduler.scale_model_input(latents, timestep)
            latents = scheduler.step(pipe.unet(latents, timestep).sample, timestep, latents).prev_sample
    return latents


def test_a_run_that_begins_in_the_middle_computes_its_first_call(unet_pipeline):
    pipe = unet_pipeline()
    recorder = Recorder(pipe.unet.mid_block.resnets[0])
    installed(pipe, {CUT: "CRRRRCRR"})
    drive(pipe, 8, start=2)
    assert recorder.calls == [2, 5]


def test_a_change_of_shape_computes_anew(unet_pipeline):
    pipe = unet_pipeline()
    recorder = Recorder(pipe.unet.mid_block.resnets[0])
    installed(pipe, {CUT: "CRRRRR"})
    drive(pipe, 6, rows=(2, 2, 1, 1, 1, 1))
    assert recorder.calls == [0, 2]


def kept_by(storage: dict[Any, Any]) -> list[Any]:
    return [value for value in storage.values() if hasattr(value, "values") and value.values]


def tensors_of(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(list(values.values())) if isinstance(leaf, torch.Tensor)]


def test_values_are_freed_as_soon_as_no_call_needs_them(unet_pipeline):
    pipe = unet_pipeline()
    kept: list[bool] = []
    installed(pipe, {CUT: "CCRCRR"})
    pipe.scheduler.set_timesteps(6)
    latents = torch.zeros(1, 1, 16, 16)
    with torch.no_grad():
        for timestep in pipe.scheduler.timesteps:
            output = pipe.unet(latents, timestep).sample
            kept.append(bool(kept_by(run_storage())))
            pipe.scheduler.step(output, timestep, latents)
    assert kept == [False, True, False, True, True, False]
    assert run_storage() is None


@pytest.mark.parametrize("where", ["denoiser", "between"])
def test_an_exception_frees_what_was_kept_and_the_next_run_is_clean(unet_pipeline, where):
    pipe = unet_pipeline()
    units = installed(pipe, {CUT: "CRRR"})
    expected = sample(pipe, request_of(pipe)).latents
    refs: list[Any] = []

    def fail(*_: Any) -> None:
        refs.extend(weakref.ref(tensor) for branch in kept_by(run_storage()) for tensor in tensors_of(branch.values))
        raise KeyboardInterrupt

    place = pipe.unet.conv_norm_out if where == "denoiser" else pipe.unet
    calls: list[int] = []
    handle = place.register_forward_hook(lambda *_: calls.append(1) or (fail() if len(calls) == 2 else None))
    with pytest.raises(KeyboardInterrupt):
        pipe(batch_size=1, num_inference_steps=4)
    handle.remove()
    gc.collect()
    assert refs
    assert not [ref for ref in refs if ref() is not None]
    assert run_storage() is None
    assert torch.equal(sample(pipe, request_of(pipe)).latents, expected)
    assert units.names == ("deep",)


def test_threads_that_share_a_denoiser_keep_apart(unet_pipeline):
    pipe = unet_pipeline()
    units = installed(pipe, {CUT: "CRRRRR"})
    expected = {seed: torch.tensor(0) for seed in (1, 2)}
    found: dict[int, torch.Tensor] = {}
    barrier = threading.Barrier(2, timeout=60)

    def run(seed: int, meet: bool) -> torch.Tensor:
        scheduler = type(pipe.scheduler).__mro__[1].from_config(pipe.scheduler.config)
        own = diffusers.DDIMPipeline(pipe.unet, scheduler)
        attach_clock(own)
        own.scheduler.set_timesteps(6)
        latents = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            for timestep in own.scheduler.timesteps:
                if meet:
                    barrier.wait()
                latents = own.scheduler.step(pipe.unet(latents, timestep).sample, timestep, latents).prev_sample
        end_run(own)
        return latents

    for seed in expected:
        expected[seed] = run(seed, False)
    threads = [
        threading.Thread(
            target=contextvars.Context().run, args=(lambda seed=seed: found.update({seed: run(seed, True)}),)
        )
        for seed in expected
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert units.plan is not None
    assert all(torch.equal(found[seed], expected[seed]) for seed in expected)


def test_a_replayed_call_computes_everything(unet_pipeline):
    pipe = unet_pipeline()
    calls = capture_calls(pipe, request_of(pipe))
    before = [call.replay(pipe.unet)[0] for call in calls]
    installed(pipe, {CUT: "CRRR"})
    assert all(torch.equal(call.replay(pipe.unet)[0], first) for call, first in zip(calls, before, strict=True))


def test_another_plan_takes_the_place_of_the_first(unet_pipeline):
    pipe = unet_pipeline()
    installed(pipe, {ENCODER: "CRRR"})
    second = installed(pipe, {CUT: "CCRR"})
    assert installed_units(pipe.unet) is second
    recorder = Recorder(pipe.unet.mid_block.resnets[0])
    sample(pipe, request_of(pipe))
    assert recorder.calls == [0, 1]


def test_a_plan_for_another_model_is_refused_and_nothing_is_hooked(unet_pipeline, dit_pipeline):
    pipe = unet_pipeline()
    plan = plan_for(dit_pipeline(), {blocks(0, 1): "CR"})
    with pytest.raises(ModelError, match="is for a DiTTransformer2DModel; this is a UNet2DModel"):
        install_plan_(pipe, "unet", plan)
    assert installed_units(pipe.unet) is None


def test_a_range_of_unknown_blocks_is_refused(unet_pipeline):
    unit = blocks(0, 1, "down_blocks")
    with pytest.raises(UnsupportedError, match="DownBlock2D cannot be cached as a range"):
        CachedUnits(unet_pipeline().unet, [unit])


def test_a_cached_pipeline_keeps_its_class_name_and_saves(unet_pipeline, tmp_path):
    pipe = unet_pipeline()
    installed(pipe, {CUT: "CR"})
    assert isinstance(pipe, diffusers.DDIMPipeline)
    assert type(pipe).__name__ == "DDIMPipeline"
    pipe.save_pretrained(tmp_path / "saved")
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved")) is diffusers.DDIMPipeline


def test_no_cache_is_part_of_the_face():
    assert dacc.no_cache is no_cache
