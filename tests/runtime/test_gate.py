from __future__ import annotations

from typing import Any

import pytest
import torch

from dacc.core.cache_plan import Gate, Predictor
from dacc.runtime.clock import run_storage
from dacc.runtime.gate import GateState, relative_change
from dacc.runtime.installed import installed_units
from dacc.runtime.trajectory import sample

from .cache_plans import CUT, blocks, module, plan_for
from .test_cached import FLUX, Recorder, installed, request_of, run_grid

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 inside diffusers
BODY = blocks(1, 2)
ENDLESS = 1e30


def gated(pipe: Any, codes: str, *, predict: Any = None, unit: Any = BODY, **fields: Any) -> Recorder:
    """Install a gated plan; tells the calls in which the range runs."""
    inside = pipe.transformer.transformer_blocks[unit.first]
    recorder = Recorder(inside.norm1 if hasattr(inside, "norm1") else inside.attn1)
    more = {"predict": {"body": predict}} if predict else {}
    installed(pipe, {unit: codes}, gates={"body": Gate(**fields)}, **more)
    return recorder


def run(pipe: Any, steps: int = 10, **fields: Any) -> torch.Tensor:
    return sample(pipe, request_of(pipe, num_inference_steps=steps, **fields)).latents


@pytest.mark.parametrize("signal", ["residual", "forecast"])
def test_no_change_is_below_nothing_and_every_change_below_infinity(dit_pipeline, signal):
    pipe = dit_pipeline()
    before = run(pipe)
    recorder = gated(pipe, "CCGGGGGGGC", signal=signal, threshold=0)
    assert torch.equal(run(pipe), before)
    assert recorder.calls == list(range(10))
    recorder = gated(pipe, "CCGGGGGGGC", signal=signal, threshold=ENDLESS)
    assert not torch.equal(run(pipe), before)
    assert recorder.calls == [0, 1, 9]


def test_a_gate_that_always_skips_is_the_plan_that_reuses_and_with_a_predictor_the_one_that_forecasts(dit_pipeline):
    pipe = dit_pipeline()
    for code, predict in (("R", None), ("F", Predictor())):
        installed(pipe, {BODY: "CC" + 4 * code + "C" + code}, predict={"body": predict} if predict else {})
        expected = run(pipe, 8)
        gated(pipe, "CCGGGGCG", predict=predict, threshold=ENDLESS)
        assert torch.equal(run(pipe, 8), expected)


def test_after_so_many_skipped_calls_one_computes(dit_pipeline):
    pipe = dit_pipeline()
    recorder = gated(pipe, "CGGGGGGGGG", threshold=ENDLESS, max_consecutive=3)
    run(pipe)
    assert recorder.calls == [0, 4, 8]


def changes(pipe: Any, threshold: float, **fields: Any) -> tuple[list[int], list[float | None]]:
    """The computed calls, and what the gate saw at each."""
    recorder, seen = gated(pipe, "CCGGGGGGGG", threshold=threshold, **fields), []
    decide = GateState.decide

    def watched(self: Any, plan: Any, call: int, unit: str, change: float | None) -> str:
        seen.append(change)
        return decide(self, plan, call, unit, change)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GateState, "decide", watched)
        run(pipe, guidance_scale=1.5, class_labels=(0, 1))
    return recorder.calls, seen


def test_the_gate_compares_with_the_last_computed_call(dit_pipeline):
    """Slow and obvious: the residual of the first block at every call, and what follows from their changes."""
    pipe = dit_pipeline()
    _, seen = changes(pipe, ENDLESS)
    threshold = sorted(seen)[len(seen) // 2]
    residuals: list[torch.Tensor] = []
    block = pipe.transformer.transformer_blocks[0]
    block.register_forward_hook(lambda _, args, output: residuals.append(output - args[0]))
    computed, seen = changes(pipe, threshold)
    expected, last = [0, 1], residuals[1]
    for call in range(2, 10):
        change = (residuals[call] - last).abs().mean() / last.abs().mean()
        assert seen[call - 2] == pytest.approx(change.item(), rel=1e-5)
        if change >= threshold:
            expected.append(call)
            last = residuals[call]
    assert computed == expected
    assert 2 < len(computed) < 10


def test_the_gate_compares_a_forecast_with_what_it_foretold(dit_pipeline):
    """Slow and obvious: straight lines through the last two outputs of the first block, over the actual ones."""
    pipe = dit_pipeline()
    outputs: list[torch.Tensor] = []
    pipe.transformer.transformer_blocks[0].register_forward_hook(lambda _, args, output: outputs.append(output))
    _, seen = changes(pipe, 0, signal="forecast")
    for call in range(2, 10):
        actual, foretold = outputs[call], 2 * outputs[call - 1] - outputs[call - 2]
        change = (actual - foretold).abs().mean() / actual.abs().mean()
        assert seen[call - 2] == pytest.approx(change.item(), rel=1e-4)


def test_other_guidance_branches_follow_the_first_and_keep_values_of_their_own(flux_pipeline):
    pipe = flux_pipeline()
    unit = blocks(1, 2, *FLUX)
    request = request_of(pipe, guidance_scale=3.0, prompts=("a red circle",), seeds=(1,), num_inference_steps=8)
    plan = plan_for(pipe, {unit: "CGGGGGGG"}, grid=run_grid(pipe, request), gates={"body": Gate(threshold=0.45)})
    from dacc.runtime.installed import install_plan_

    install_plan_(pipe, "transformer", plan)
    units, actions, known = installed_units(pipe.transformer), [], []
    close = units.close

    def keep(frame: Any, row: Any) -> None:
        actions.append((frame.state.call, frame.state.evaluation, frame.actions["body"]))
        known.append(dict(frame.values))
        close(frame, row)

    units.close = keep
    sample(pipe, request)
    assert [(call, evaluation) for call, evaluation, _ in actions] == [(n // 2, n % 2) for n in range(16)]
    assert all(first[2] == second[2] for first, second in zip(actions[::2], actions[1::2], strict=True))
    assert {action for _, _, action in actions} == {"C", "R"}
    for first, second in zip(known[:-2:2], known[1:-2:2], strict=True):
        assert first.keys() == second.keys()
        assert not [key for key in first if first[key] is second[key]]


def test_a_run_that_begins_in_the_middle_computes_first_and_nothing_is_left_behind(dit_pipeline):
    pipe = dit_pipeline()
    recorder = gated(pipe, "CCGGGGGGGG", threshold=ENDLESS, signal="forecast", order=2, predict=Predictor())
    pipe.scheduler.set_timesteps(10)
    latents, labels = torch.zeros(1, 4, 8, 8), torch.tensor([1])
    shape = (1, pipe.transformer.config.in_channels, *[pipe.transformer.config.sample_size] * 2)
    latents = torch.randn(shape, generator=torch.manual_seed(0))
    with torch.no_grad():
        for timestep in pipe.scheduler.timesteps[4:]:
            pipe.scheduler.scale_model_input(latents, timestep)
            output = pipe.transformer(latents, timestep[None], class_labels=labels).sample
            output = output[:, : latents.shape[1]]
            latents = pipe.scheduler.step(output, timestep, latents).prev_sample
    assert recorder.calls == [4]
    assert run_storage() is None


def test_decisions_and_their_edges(dit_pipeline):
    state = GateState()
    plan = plan_for(dit_pipeline(), {BODY: "CG"}, gates={"body": Gate(threshold=0.1, max_consecutive=2)})
    assert state.decide(plan, 1, "body", None) == "C"
    assert state.decide(plan, 1, "body", float("nan")) == "C"
    assert state.decide(plan, 1, "body", 0.1) == "C"
    assert state.decide(plan.model_copy(update={"predict": {"body": Predictor()}}), 1, "body", 0.09) == "F"
    state.note(3, "C")
    assert [state.decide(plan, call, "body", 0.0) for call in (4, 5, 6)] == ["R", "R", "C"]
    known = torch.tensor([2.0, -2.0])
    assert relative_change(torch.tensor([1.0, 3.0]), known, known) == pytest.approx(1.5)


def test_gates_of_other_parts_and_codes_without_a_gate_are_refused(unet_pipeline, dit_pipeline):
    for pipe, codes, gates, said in (
        (unet_pipeline(), {CUT: "CG"}, {}, "asks a gate, and there is none"),
        (unet_pipeline(), {CUT: "CG"}, {"deep": Gate(threshold=1)}, "a range of blocks with a block before it"),
        (dit_pipeline(), {blocks(0, 1): "CG"}, {"body": Gate(threshold=1)}, "a block before it"),
        (dit_pipeline(), {BODY: "CG", module("x"): "CC"}, {"body": Gate(threshold=1)}, "a plan of one unit"),
    ):
        with pytest.raises(ValueError, match=said):
            plan_for(pipe, codes, gates=gates)
