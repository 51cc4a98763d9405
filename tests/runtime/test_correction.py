from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from dacc.core.cache_plan import CorrectionId
from dacc.core.errors import BundleError
from dacc.core.tensor_file import content_hash
from dacc.runtime.cached import CachePlanWarning
from dacc.runtime.correction import Correction
from dacc.runtime.installed import install_plan_
from dacc.runtime.plan import planned_macs
from dacc.runtime.request import RunRequest
from dacc.runtime.trajectory import sample

from .cache_plans import blocks, module, plan_for

REQUEST = RunRequest(seeds=(1,), num_inference_steps=4)


def with_tables(plan: Any, tables: dict[str, torch.Tensor]) -> tuple[Any, dict[str, torch.Tensor]]:
    return plan.model_copy(update={"correction": CorrectionId(sha256=content_hash(tables))}), tables


def tables_for(name: str, scale: torch.Tensor, shift: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{name}.scale": scale, f"{name}.shift": shift}


def watch_first_up_block(pipe: Any) -> list[Any]:
    """What enters it, call by call."""
    entered: list[Any] = []
    pipe.unet.up_blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: entered.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]),
        with_kwargs=True,
    )
    return entered


@torch.no_grad()
def run_by_hand(pipe: Any, timesteps: torch.Tensor) -> torch.Tensor:
    value = torch.ones(1, 1, 16, 16)
    for timestep in timesteps:
        given = pipe.scheduler.scale_model_input(value, timestep)
        value = pipe.scheduler.step(pipe.unet(given, timestep)[0], timestep, value).prev_sample
    return value


def test_reused_values_are_mapped_by_call_and_channel(unet_pipeline):
    pipe = unet_pipeline()
    plan = plan_for(pipe, {module("mid_block"): "CRRC"})
    scale, shift = torch.rand(4, 32), torch.rand(4, 32)
    plan, tables = with_tables(plan, tables_for("mid_block/mid_block/0", scale, shift))
    entered = watch_first_up_block(pipe)
    install_plan_(pipe, "unet", plan, Correction(tables, plan))
    sample(pipe, REQUEST)
    for call in (1, 2):
        wanted = scale[call].reshape(1, -1, 1, 1) * entered[0] + shift[call].reshape(1, -1, 1, 1)
        torch.testing.assert_close(entered[call], wanted)


def test_what_was_fitted_for_one_solver_is_left_out_with_another_on_the_same_levels(unet_pipeline):
    pipe = unet_pipeline()
    plan = plan_for(pipe, {module("mid_block"): "CRRC"})
    plan, tables = with_tables(plan, tables_for("mid_block/mid_block/0", torch.rand(4, 32), torch.rand(4, 32)))
    pipe.scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    entered = watch_first_up_block(pipe)
    install_plan_(pipe, "unet", plan, Correction(tables, plan))
    pipe.scheduler.set_timesteps(4)
    told = "4 DDIMScheduler calls; this run of 4 DDPMScheduler calls follows its noise levels, without the correction"
    with pytest.warns(CachePlanWarning, match=told):
        run_by_hand(pipe, pipe.scheduler.timesteps)
    assert torch.equal(entered[1], entered[0])
    assert torch.equal(entered[2], entered[0])
    assert not torch.equal(entered[3], entered[0])


def mixing_tables(name: str, channels: int, rank: int = 2) -> dict[str, torch.Tensor]:
    tables = tables_for(name, torch.rand(4, channels), torch.rand(4, channels))
    return tables | {f"{name}.{part}": torch.randn(4, rank, channels) for part in ("down", "up")}


def test_channels_of_maps_are_mixed_beside_that(unet_pipeline):
    pipe = unet_pipeline()
    name = "mid_block/mid_block/0"
    plan, tables = with_tables(plan_for(pipe, {module("mid_block"): "CRRC"}), mixing_tables(name, 32))
    entered = watch_first_up_block(pipe)
    install_plan_(pipe, "unet", plan, Correction(tables, plan))
    sample(pipe, REQUEST)
    for call in (1, 2):
        parts = {part: tables[f"{name}.{part}"][call] for part in ("scale", "shift", "down", "up")}
        wide = [parts[part].reshape(1, -1, 1, 1) for part in ("scale", "shift")]
        mixed = torch.einsum("bmhw,rm,rn->bnhw", entered[0], parts["down"], parts["up"])
        torch.testing.assert_close(entered[call], wide[0] * entered[0] + wide[1] + mixed, rtol=1e-4, atol=1e-4)


def test_channels_of_tokens_are_mixed_in_any_precision(dit_pipeline):
    pipe = dit_pipeline()
    name = "body/transformer_blocks.1/0"
    plan, tables = with_tables(plan_for(pipe, {blocks(0, 2): "CRCR"}), mixing_tables(name, 64))
    value = torch.randn(2, 16, 64).bfloat16()
    parts = {part: tables[f"{name}.{part}"][1] for part in ("scale", "shift", "down", "up")}
    wanted = parts["scale"] * value + parts["shift"] + value.float() @ parts["down"].T @ parts["up"]
    found = Correction(tables, plan).apply("body", "transformer_blocks.1", 1, value)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted.bfloat16(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "edit",
    [
        lambda name, tables: tables.pop(f"{name}.down"),
        lambda name, tables: tables.update({f"{name}.down": torch.zeros(4, 3, 64)}),
        lambda name, tables: [tables.pop(f"{name}.{part}") for part in ("scale", "shift")],
        lambda name, tables: tables.update({f"{name}.up": torch.zeros(4, 64)}),
    ],
    ids=["one alone", "ranks", "no factors", "axes"],
)
def test_tables_that_do_not_mix_are_refused(dit_pipeline, edit):
    name = "body/transformer_blocks.1/0"
    tables = mixing_tables(name, 64)
    edit(name, tables)
    plan, tables = with_tables(plan_for(dit_pipeline(), {blocks(0, 2): "CRCR"}), tables)
    with pytest.raises(BundleError, match="does not fit a plan of 4 calls"):
        Correction(tables, plan)


def test_one_and_zero_change_nothing(dit_pipeline):
    pipe = dit_pipeline()
    plan = plan_for(pipe, {blocks(0, 2): "CRCR"})
    install_plan_(pipe, "transformer", plan)
    plain = sample(pipe, REQUEST).latents
    name = "body/transformer_blocks.1/0"
    plan, tables = with_tables(plan, tables_for(name, torch.ones(4, 64), torch.zeros(4, 64)))
    install_plan_(pipe, "transformer", plan, Correction(tables, plan))
    assert torch.equal(sample(pipe, REQUEST).latents, plain)
    plan, tables = with_tables(plan, tables_for(name, torch.ones(4, 64), torch.ones(4, 64)))
    install_plan_(pipe, "transformer", plan, Correction(tables, plan))
    assert not torch.equal(sample(pipe, REQUEST).latents, plain)


def test_a_value_of_another_call_than_the_plan_means_is_not_corrected(unet_pipeline):
    pipe = unet_pipeline()
    plan = plan_for(pipe, {module("mid_block"): "CRRR"})
    plan, tables = with_tables(plan, tables_for("mid_block/mid_block/0", torch.rand(4, 32), torch.rand(4, 32)))
    latents = []
    for correction in (None, Correction(tables, plan)):
        units = install_plan_(pipe, "unet", plan, correction)
        scheduler = pipe.scheduler
        scheduler.set_timesteps(4)
        latents.append(run_by_hand(pipe, scheduler.timesteps[1:]))  # from call 1 on, which has nothing to reuse
        units.remove_()
    assert torch.equal(*latents)


@pytest.mark.parametrize(
    "tables",
    [
        {"u.scale": torch.ones(4, 3)},
        tables_for("u", torch.ones(3, 3), torch.zeros(3, 3)),
        tables_for("u", torch.ones(4, 3), torch.zeros(4, 2)),
        tables_for("u", torch.ones(4, 3).half(), torch.zeros(4, 3).half()),
        {"u.other": torch.ones(4, 3)},
    ],
)
def test_tables_that_do_not_fit_are_refused(unet_pipeline, tables):
    plan, tables = with_tables(plan_for(unet_pipeline(), {module("mid_block"): "CRRC"}), tables)
    with pytest.raises(BundleError, match="does not fit a plan of 4 calls"):
        Correction(tables, plan)


def test_tables_of_other_channels_are_refused_when_they_are_used(unet_pipeline):
    pipe = unet_pipeline()
    plan = plan_for(pipe, {module("mid_block"): "CRRC"})
    for name, said in (("mid_block/mid_block/0", "one for 3 channels"), ("other/mid_block/0", "none")):
        plan, tables = with_tables(plan, tables_for(name, torch.ones(4, 3), torch.zeros(4, 3)))
        install_plan_(pipe, "unet", plan, Correction(tables, plan))
        with pytest.raises(BundleError, match=said):
            sample(pipe, REQUEST)
    assert planned_macs(plan, {"mid_block": frozenset()}) == 2 * 10 + 2 * 4
