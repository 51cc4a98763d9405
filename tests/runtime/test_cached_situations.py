"""Plans in pipelines that begin in the middle, have two denoisers, an adapter, offloaded weights or compiled blocks."""

from __future__ import annotations

from typing import Any

import accelerate
import diffusers
import pytest
import torch

from dacc.core.cache_plan import UnetCut
from dacc.runtime.clock import current_run
from dacc.runtime.compiled import Outside
from dacc.runtime.installed import install_plan_, no_cache, remove_plans_
from dacc.runtime.trajectory import sample

from .cache_plans import CUT, OUTPUT, blocks, grid_of, plan_for
from .test_cached import Recorder, installed, request_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 inside diffusers
SEED = 5


def redrawn(pipe: Any, strength: float, steps: int) -> torch.Tensor:
    image = torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    return pipe(
        "one", image=image, strength=strength, num_inference_steps=steps, output_type="latent",
        generator=torch.Generator().manual_seed(SEED),
    ).images  # fmt: skip


@pytest.mark.parametrize(("strength", "begins"), [(0.3, 7), (0.6, 4)])
def test_redrawing_an_image_follows_the_plan_from_the_call_at_which_it_begins(sd_pipeline, strength, begins):
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**sd_pipeline().components, requires_safety_checker=False)
    before = redrawn(pipe, strength, 10)
    installed(pipe, {CUT: "C" * 10})
    assert torch.equal(redrawn(pipe, strength, 10), before)
    recorder = Recorder(pipe.unet.mid_block.resnets[0])
    installed(pipe, {CUT: "CRCRRRRRCR"})
    cached = redrawn(pipe, strength, 10)
    assert sorted(set(recorder.calls)) == sorted({begins, 8})
    assert not torch.equal(cached, before)
    assert torch.equal(redrawn(pipe, strength, 10), cached)
    with no_cache(pipe):
        assert torch.equal(redrawn(pipe, strength, 10), before)


def test_adapters_that_are_loaded_later_count_in_computed_and_in_reused_calls(sd_pipeline):
    peft = pytest.importorskip("peft")
    pipe = sd_pipeline()
    request = request_of(pipe)
    installed(pipe, {UnetCut(id="deep", block=0, layer=0): "CRCR"})
    plain = sample(pipe, request).latents
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    torch.manual_seed(SEED)
    pipe.unet.add_adapter(config)
    adapted = sample(pipe, request).latents
    assert not torch.equal(adapted, plain)
    with no_cache(pipe):
        full = sample(pipe, request).latents
    assert not torch.equal(adapted, full)
    remove_plans_(pipe)
    assert torch.equal(sample(pipe, request).latents, full)
    installed(pipe, {CUT: "CCCC"})
    assert torch.equal(sample(pipe, request).latents, full)
    pipe.unet.disable_adapters()
    installed(pipe, {CUT: "CRCR"})
    assert torch.equal(sample(pipe, request).latents, plain)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level", "sequential", "sequential, buffers too"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_that_come_and_go_change_nothing(unet_pipeline, kind, when):
    pipe, other = unet_pipeline(), unet_pipeline()
    other.unet.load_state_dict(pipe.unet.state_dict())
    installed(pipe, {CUT: "CRCR"})
    wanted = sample(pipe, request_of(pipe)).latents
    if when == "after":
        installed(other, {CUT: "CRCR"})
    device = torch.device("cpu")
    if kind.startswith("sequential"):
        accelerate.cpu_offload(other.unet, execution_device=device, offload_buffers=kind.endswith("too"))
        assert {parameter.device.type for parameter in other.unet.parameters()} == {"meta"}
    else:
        blockwise = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        other.unet.enable_group_offload(onload_device=device, offload_device=device, offload_type=kind, **blockwise)
    if when == "before":
        installed(other, {CUT: "CRCR"})
    assert torch.equal(sample(other, request_of(other)).latents, wanted)
    remove_plans_(other)
    with no_cache(pipe):
        assert torch.equal(sample(other, request_of(other)).latents, sample(pipe, request_of(pipe)).latents)


@pytest.mark.parametrize("when", ["before", "after"])
def test_compiled_blocks_run_as_the_others(dit_pipeline, when):
    pipe, body = dit_pipeline(), blocks(1, 2)
    request = request_of(pipe)
    installed(pipe, {body: "CRCR"})
    wanted = sample(pipe, request).latents
    with no_cache(pipe):
        full = sample(pipe, request).latents
    torch.compiler.reset()
    if when == "before":
        remove_plans_(pipe)
    for block in pipe.transformer.transformer_blocks:
        block.compile(backend="eager", fullgraph=True)  # as compile_repeated_blocks of classes that name theirs
    if when == "before":
        installed(pipe, {body: "CRCR"})
    torch.testing.assert_close(sample(pipe, request).latents, wanted)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.testing.assert_close(sample(pipe, request).latents, wanted)
    with no_cache(pipe):
        torch.testing.assert_close(sample(pipe, request).latents, full)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled  # none for what a call decides
    assert not torch.allclose(wanted, full)
    remove_plans_(pipe)
    assert not any(isinstance(block._compiled_call_impl, Outside) for block in pipe.transformer.transformer_blocks)
    torch.testing.assert_close(sample(pipe, request).latents, full)
    torch.compiler.reset()


def wan_pipeline(*, boundary_ratio: float | None = 0.5) -> Any:
    """Two denoisers: one for the noisy half of the run, one for the other; or one alone."""

    def transformer(seed: int) -> Any:
        torch.manual_seed(seed)
        return diffusers.WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
            ffn_dim=16, num_layers=3, cross_attn_norm=True, rope_max_seq_len=32,
        ).eval()  # fmt: skip

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=transformer(1), transformer_2=transformer(2) if boundary_ratio else None,
        boundary_ratio=boundary_ratio,
    )  # fmt: skip


def clip_of(pipe: Any, steps: int) -> torch.Tensor:
    words = torch.linspace(-1, 1, 2 * 4 * 8).reshape(2, 4, 8)
    return pipe(
        prompt_embeds=words[:1], negative_prompt_embeds=words[1:], height=16, width=16, num_frames=5,
        num_inference_steps=steps, guidance_scale=2.0, output_type="latent",
        generator=torch.Generator().manual_seed(SEED),
    ).frames  # fmt: skip


def test_two_denoisers_have_plans_of_their_own_on_one_grid():
    pipe, body = wan_pipeline(), blocks(1, 2, "blocks")
    pipe.set_progress_bar_config(disable=True)
    before = clip_of(pipe, 8)
    called = {name: Recorder(getattr(pipe, name).blocks[0]) for name in ("transformer", "transformer_2")}
    grid = grid_of(pipe, 8)
    for name, codes in (("transformer", "CCCCCCCC"), ("transformer_2", "CCCCCCCC")):
        install_plan_(pipe, name, plan_for(pipe, {body: codes}, grid=grid))
    assert torch.equal(clip_of(pipe, 8), before)
    first, second = called["transformer"].calls, called["transformer_2"].calls
    assert sorted(set(first + second)) == list(range(8))
    assert max(first) < min(second)
    inside = {name: Recorder(getattr(pipe, name).blocks[1].ffn) for name in called}
    install_plan_(pipe, "transformer", plan_for(pipe, {body: "CRCR" + "RRRR"}, grid=grid))
    install_plan_(pipe, "transformer_2", plan_for(pipe, {body: "CRRR" + "RRRR"}, grid=grid))
    cached = clip_of(pipe, 8)
    assert not torch.equal(cached, before)
    assert sorted(set(inside["transformer"].calls)) == [call for call in (0, 2) if call <= max(first)]
    assert sorted(set(inside["transformer_2"].calls)) == [min(second)]  # it has nothing to reuse before
    assert torch.equal(clip_of(pipe, 8), cached)
    with no_cache(pipe):
        assert torch.equal(clip_of(pipe, 8), before)


@pytest.mark.parametrize(("unit", "evaluated"), [(blocks(1, 2, "blocks"), 8), (OUTPUT, 2)], ids=["blocks", "output"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_guidance_branches_of_a_denoiser_compiled_as_a_whole_keep_their_own_values(wrapped, unit, evaluated):
    pipe = wan_pipeline(boundary_ratio=None)
    pipe.set_progress_bar_config(disable=True)
    install_plan_(pipe, "transformer", plan_for(pipe, {unit: "CRRRCRRR"}, grid=grid_of(pipe, 8)))
    wanted = clip_of(pipe, 8)
    seen: list[tuple[int, str | None]] = []
    pipe.transformer.blocks[0].register_forward_hook(
        lambda *_: seen.append((current_run().evaluation, current_run().branch))
    )
    torch.compiler.reset()
    if wrapped:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    else:
        pipe.transformer.compile(backend="eager")
    torch.testing.assert_close(clip_of(pipe, 8), wanted)
    assert seen == [(0, "cond"), (1, "uncond")] * evaluated
    torch.compiler.reset()


def test_redrawing_a_clip_follows_the_plan_from_the_call_at_which_it_begins():
    """Its pipeline does not tell the scheduler that it begins in the middle."""
    parts = wan_pipeline(boundary_ratio=None).components
    del parts["transformer_2"]
    pipe, body = diffusers.WanVideoToVideoPipeline(**parts), blocks(1, 2, "blocks")
    pipe.set_progress_bar_config(disable=True)
    words = torch.linspace(-1, 1, 2 * 4 * 8).reshape(2, 4, 8)

    def again() -> torch.Tensor:
        return pipe(
            video=torch.linspace(0, 1, 5 * 3 * 16 * 16).reshape(1, 5, 3, 16, 16), strength=0.5,
            prompt_embeds=words[:1], negative_prompt_embeds=words[1:], height=16, width=16, num_inference_steps=10,
            guidance_scale=2.0, output_type="latent", generator=torch.Generator().manual_seed(SEED),
        ).frames  # fmt: skip

    before = again()
    install_plan_(pipe, "transformer", plan_for(pipe, {body: "CRRRRRRRCR"}, grid=grid_of(pipe, 10)))
    recorder = Recorder(pipe.transformer.blocks[1].ffn)
    timesteps: list[float] = []
    pipe.transformer.condition_embedder.register_forward_hook(
        lambda _, args, __: timesteps.append((args[0][0].item(), current_run().timestep))
    )
    assert not torch.equal(again(), before)
    assert recorder.calls == [5, 5, 8, 8]
    assert all(given == known for given, known in timesteps)
    assert len(timesteps) == 10
