from __future__ import annotations

import contextvars
import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

from dacc.runtime.clock import RunState, current_run, fixed_run, reset_clock
from dacc.runtime.clockwork import attach_clock, observe_steps

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 inside diffusers

SCHEDULERS = {  # class -> denoiser calls of a run of 4 steps
    "DDIMScheduler": 4,
    "EulerDiscreteScheduler": 4,
    "DPMSolverMultistepScheduler": 4,
    "UniPCMultistepScheduler": 4,
    "FlowMatchEulerDiscreteScheduler": 4,
    "HeunDiscreteScheduler": 7,
    "KDPM2DiscreteScheduler": 7,
    "FlowMatchHeunDiscreteScheduler": 7,
}


@pytest.fixture(autouse=True)
def _fresh_clock():
    yield
    reset_clock()


class Spy:
    """Collects the run state at every call of a module."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.states: list[RunState | None] = []
        module.register_forward_pre_hook(lambda *_: self.states.append(current_run()))

    def take(self) -> list[RunState]:
        states, self.states = self.states, []
        assert all(states)
        return states  # type: ignore[return-value]


def drive(
    denoiser: Any, scheduler: Any, *, steps: int = 4, start: int = 0, scale: bool = True, evaluations: int = 1
) -> None:
    """The loop of a pipeline, written out."""
    scheduler.set_timesteps(steps)
    if start and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    latents = torch.zeros(3, 1, 16, 16)
    for timestep in scheduler.timesteps[start:]:
        if scale and hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(latents, timestep)
        for _ in range(evaluations):
            output = denoiser(latents, timestep).sample
        latents = scheduler.step(output, timestep, latents).prev_sample


def clocked(pipe: Any, scheduler: Any = None) -> tuple[Any, Spy]:
    if scheduler is not None:
        pipe.register_modules(scheduler=scheduler)
    attach_clock(pipe)
    return pipe, Spy(pipe.unet)


@pytest.mark.parametrize(("name", "calls"), SCHEDULERS.items())
@pytest.mark.parametrize("scale", [True, False])
def test_every_scheduler_counts_calls_and_starts_anew(
    unet_pipeline: Callable[[], Any], name: str, calls: int, scale: bool
) -> None:
    pipe, spy = clocked(unet_pipeline(), getattr(diffusers, name)())
    runs = []
    for _ in range(2):
        drive(pipe.unet, pipe.scheduler, scale=scale)
        states = spy.take()
        assert [state.call for state in states] == list(range(calls))
        assert {(state.calls, state.steps) for state in states} == {(calls, 4)}
        assert [state.timestep for state in states] == pipe.scheduler.timesteps.tolist()
        assert [state.step for state in states] == ([0, 1, 2, 3] if calls == 4 else [0, 0, 1, 1, 2, 2, 3])
        assert current_run() is None
        runs.append(states[0].run)
    assert runs[0] != runs[1]


def test_pndm_counts_its_extra_call(unet_pipeline: Callable[[], Any]) -> None:
    pipe, spy = clocked(unet_pipeline(), diffusers.PNDMScheduler(skip_prk_steps=True))
    drive(pipe.unet, pipe.scheduler)
    assert [state.call for state in spy.take()] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_run_that_starts_in_the_middle_keeps_its_place_on_the_grid(
    unet_pipeline: Callable[[], Any], name: str
) -> None:
    pipe, spy = clocked(unet_pipeline(), getattr(diffusers, name)())
    drive(pipe.unet, pipe.scheduler, steps=6, start=2)
    assert [state.call for state in spy.take()] == [2, 3, 4, 5]


ASKED = {  # how denoisers are given a timestep
    "by place": lambda t: ((t,), {}),
    "by name": lambda t: ((), {"timestep": t}),
    "as a number": lambda t: ((t.item(),), {}),
    "for every row": lambda t: ((), {"timestep": t.expand(3)}),
    "for every frame": lambda t: ((t.expand(3, 2),), {}),
    "from 0 to 1": lambda t: ((t.expand(3) / 1000,), {}),
    "in half precision": lambda t: ((), {"timestep": t.to(torch.bfloat16) / 1000}),
}


def untold(denoiser: Any, scheduler: Any, asking: Callable[[Any], Any], *, start: int, steps: int = 8) -> None:
    """The loop of a pipeline that begins in the middle and tells its scheduler nothing."""
    denoiser.forward = lambda *_, **__: None
    scheduler.set_timesteps(steps)
    latents = torch.zeros(3, 1, 16, 16)
    for timestep in scheduler.timesteps[start:]:
        args, kwargs = asking(timestep)
        for _ in range(2):
            denoiser(latents, *args, **kwargs)
        scheduler.step(latents, timestep, latents)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "FlowMatchEulerDiscreteScheduler"])
@pytest.mark.parametrize("start", [0, 1, 5])
@pytest.mark.parametrize("asking", ASKED.values(), ids=ASKED)
def test_a_run_that_nothing_is_told_of_begins_where_its_denoiser_is_asked(
    unet_pipeline: Callable[[], Any], name: str, start: int, asking: Callable[[Any], Any]
) -> None:
    pipe, spy = clocked(unet_pipeline(), getattr(diffusers, name)())
    untold(pipe.unet, pipe.scheduler, asking, start=start)
    states = spy.take()
    assert [state.call for state in states] == [call for call in range(start, 8) for _ in range(2)]
    assert [state.timestep for state in states[::2]] == pipe.scheduler.timesteps[start:].tolist()
    assert [state.evaluation for state in states] == [0, 1] * (8 - start)


@pytest.mark.parametrize(
    "asking",
    [
        lambda t: torch.stack([t, t / 2, t * 0]),  # tokens of their own
        lambda t: 1 - t / 1000,  # backwards: 0, which is on the grid too
        lambda t: t / 1000 / (1 + t / 1000),
        lambda t: t - 0.5,
        lambda t: None,
        lambda t: torch.zeros(0),
    ],
)
def test_what_a_denoiser_is_asked_in_another_way_does_not_move_a_run(
    unet_pipeline: Callable[[], Any], asking: Callable[[Any], Any]
) -> None:
    pipe, spy = clocked(unet_pipeline(), diffusers.FlowMatchEulerDiscreteScheduler())
    pipe.unet.forward = lambda *_, **__: None
    pipe.scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25, 0.0])
    pipe.unet(torch.zeros(3, 1), timestep=asking(pipe.scheduler.timesteps[0]))
    assert [state.call for state in spy.take()] == [0]


def test_a_run_whose_scheduler_was_told_its_place_does_not_ask(unet_pipeline: Callable[[], Any]) -> None:
    pipe, spy = clocked(unet_pipeline(), diffusers.EulerDiscreteScheduler())
    pipe.scheduler.set_timesteps(4)
    pipe.scheduler.scale_model_input(torch.zeros(1), pipe.scheduler.timesteps[0])
    pipe.unet(torch.zeros(1, 1, 16, 16), pipe.scheduler.timesteps[2])
    assert [state.call for state in spy.take()] == [0]


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_run_that_is_to_begin_behind_its_end_is_left_to_diffusers(
    unet_pipeline: Callable[[], Any], name: str
) -> None:
    pipe, _ = clocked(unet_pipeline(), getattr(diffusers, name)())
    pipe.scheduler.set_timesteps(10)
    pipe.scheduler.set_begin_index(10)
    assert pipe.scheduler.begin_index == 10
    assert current_run().call == 0  # type: ignore[union-attr]
    drive(pipe.unet, pipe.scheduler, steps=3)
    assert current_run() is None


def test_a_denoiser_with_a_clock_compiles_into_one_graph(unet_pipeline: Callable[[], Any]) -> None:
    pipe = unet_pipeline()
    attach_clock(pipe)
    torch.compiler.reset()
    pipe.unet.compile(backend="eager", fullgraph=True)
    pipe.scheduler.set_timesteps(2)
    pipe.unet(torch.zeros(1, 1, 16, 16), pipe.scheduler.timesteps[0])
    torch.compiler.reset()


def test_an_exception_in_the_middle_does_not_reach_the_next_run(unet_pipeline: Callable[[], Any]) -> None:
    pipe, spy = clocked(unet_pipeline())

    def stop(sample: torch.Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), observe_steps(stop):
        drive(pipe.unet, pipe.scheduler)
    spy.take()
    drive(pipe.unet, pipe.scheduler, steps=3)
    assert [state.call for state in spy.take()] == [0, 1, 2]


def test_threads_that_share_a_denoiser_do_not_see_each_other(unet_pipeline: Callable[[], Any]) -> None:
    pipe, _ = clocked(unet_pipeline())
    barrier = threading.Barrier(2)
    seen: dict[int, list[int]] = {3: [], 5: []}

    def run(steps: int) -> None:
        scheduler = copy.deepcopy(pipe.scheduler)
        scheduler.set_timesteps(steps)
        for timestep in scheduler.timesteps:
            if len(seen[steps]) < 3:
                barrier.wait()  # interleave
            state = current_run()
            assert state is not None
            assert state.calls == steps
            seen[steps].append(state.call)
            latents = torch.zeros(1, 1, 16, 16)
            scheduler.step(latents, timestep, latents)

    threads = [threading.Thread(target=contextvars.Context().run, args=(run, steps)) for steps in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {3: [0, 1, 2], 5: [0, 1, 2, 3, 4]}
    assert current_run() is None


def test_two_evaluations_per_call_are_numbered_and_named(unet_pipeline: Callable[[], Any]) -> None:
    pipe, spy = clocked(unet_pipeline())
    drive(pipe.unet, pipe.scheduler, steps=2, evaluations=2)
    assert [(state.call, state.evaluation, state.branch) for state in spy.take()] == [
        (0, 0, None),
        (0, 1, None),
        (1, 0, None),
        (1, 1, None),
    ]


def test_the_pipelines_own_branch_names_are_used() -> None:
    model = diffusers.FluxTransformer2DModel(
        num_layers=0, num_single_layers=0, num_attention_heads=1, attention_head_dim=16
    )
    pipe = diffusers.FluxPipeline(diffusers.FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, model)
    attach_clock(pipe)
    pipe = copy.deepcopy(pipe)
    seen = []
    pipe.transformer.forward = lambda _: seen.append(current_run().branch)  # type: ignore[union-attr]
    pipe.scheduler.set_timesteps(2)
    for name in ("cond", "uncond"):
        with pipe.transformer.cache_context(name):
            pipe.transformer(torch.zeros(1, 1))
    assert seen == ["cond", "uncond"]


def test_a_batch_with_both_guidance_branches_is_recognised(dit_pipeline: Callable[[], Any]) -> None:
    pipe = dit_pipeline()
    attach_clock(pipe)
    spy = Spy(pipe.transformer)
    pipe([1, 2, 3], num_inference_steps=2, guidance_scale=4.0, output_type="pt")
    assert [state.branch for state in spy.take()] == ["both", "both"]
    pipe([1, 2], num_inference_steps=2, guidance_scale=1.0, output_type="pt")
    assert [state.branch for state in spy.take()] == [None, None]


def test_a_replaced_scheduler_works_after_attaching_again(unet_pipeline: Callable[[], Any]) -> None:
    pipe, spy = clocked(unet_pipeline())
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    attach_clock(pipe)
    attach_clock(pipe)
    drive(pipe.unet, pipe.scheduler, steps=2)
    assert [(state.call, state.evaluation) for state in spy.take()] == [(0, 0), (1, 0)]


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_and_pickles_tick_on_their_own(
    unet_pipeline: Callable[[], Any], duplicate: Callable[[Any], Any]
) -> None:
    pipe, spy = clocked(unet_pipeline())
    pipe.scheduler.set_timesteps(9)
    other = duplicate(pipe.scheduler)
    assert isinstance(other, diffusers.DDIMScheduler)
    drive(pipe.unet, other, steps=2)
    assert [state.call for state in spy.take()] == [0, 1]
    assert len(pipe.scheduler.timesteps) == 9


def test_a_copied_pipeline_has_a_clock_of_its_own(unet_pipeline: Callable[[], Any]) -> None:
    pipe, _ = clocked(unet_pipeline())
    other = copy.deepcopy(pipe)
    spy = Spy(other.unet)
    other(num_inference_steps=2, output_type="pt")
    assert [(state.call, state.evaluation) for state in spy.take()] == [(0, 0), (1, 0)]


def test_saving_and_class_names_are_untouched(unet_pipeline: Callable[[], Any], tmp_path: Any) -> None:
    plain, (pipe, _) = unet_pipeline(), clocked(unet_pipeline())
    plain.save_pretrained(tmp_path / "plain")
    pipe.save_pretrained(tmp_path / "clocked")
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "clocked" / name).read_bytes()
    assert type(plain.scheduler) is diffusers.DDIMScheduler
    assert "step" in vars(diffusers.DDIMScheduler)
    assert diffusers.DDIMScheduler.step is plain.scheduler.step.__func__


def test_results_are_the_same_with_and_without_a_clock(unet_pipeline: Callable[[], Any]) -> None:
    plain, (pipe, _) = unet_pipeline(), clocked(unet_pipeline())
    images = [p(num_inference_steps=3, generator=torch.manual_seed(1), output_type="pt").images for p in (plain, pipe)]
    assert torch.equal(*images)


def test_a_fixed_run_stands_in_for_a_real_one(unet_pipeline: Callable[[], Any]) -> None:
    pipe, spy = clocked(unet_pipeline())
    drive(pipe.unet, pipe.scheduler, steps=2)
    state = spy.take()[1]
    with fixed_run(state):
        pipe.unet(torch.zeros(1, 1, 16, 16), 5)
    assert spy.take() == [state]
    assert current_run() is None
