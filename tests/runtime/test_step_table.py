import contextvars
import copy
import threading
import warnings

import diffusers
import pytest
import torch

from dacc.core.errors import ConfigError
from dacc.core.schedule_id import schedule_id
from dacc.runtime.clock import current_grid, current_run, fixed_run, reset_clock
from dacc.runtime.clockwork import attach_clock
from dacc.runtime.step_table import StepTable, hook_step_table_, unhook_step_tables_

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 inside diffusers


@pytest.fixture(autouse=True)
def _fresh_clock():
    yield
    reset_clock()


def scheduler_of(name="DDIMScheduler", **options):
    return getattr(diffusers, name)(**options)


def fitted(steps, scheduler=None):
    scheduler = copy.deepcopy(scheduler) or scheduler_of()
    scheduler.set_timesteps(steps)
    return schedule_id(scheduler)


def rows_of_run(pipe, table, steps, scheduler=None):
    """The row at each call of a run, and the states of the calls."""
    if scheduler is not None:
        pipe.register_modules(scheduler=scheduler)
    attach_clock(pipe)
    rows, states = [], []

    def note(*_):
        rows.append(table.row())
        states.append(current_run())

    handle = pipe.unet.register_forward_pre_hook(note)
    latents = torch.zeros(1, 1, 16, 16)
    pipe.scheduler.set_timesteps(steps)
    for timestep in pipe.scheduler.timesteps:
        if hasattr(pipe.scheduler, "scale_model_input"):
            pipe.scheduler.scale_model_input(latents, timestep)
        output = pipe.unet(latents, timestep).sample
        latents = pipe.scheduler.step(output, timestep, latents).prev_sample
    handle.remove()
    return rows, states


def row_at(table, state):
    with fixed_run(state):
        return table.row()


@pytest.mark.parametrize(
    ("name", "options", "calls"),
    [
        ("DDIMScheduler", {}, 4),
        ("EulerDiscreteScheduler", {}, 4),
        ("PNDMScheduler", {"skip_prk_steps": True}, 5),
        ("HeunDiscreteScheduler", {}, 7),
        ("FlowMatchEulerDiscreteScheduler", {}, 4),
    ],
)
@pytest.mark.parametrize("rule", ["exact", "nearest"])
def test_on_its_own_grid_every_call_has_its_row(unet_pipeline, name, options, calls, rule):
    scheduler = scheduler_of(name, **options)
    table = StepTable(fitted(4, scheduler), rule)
    for _ in range(2):
        rows, states = rows_of_run(unet_pipeline(), table, 4, scheduler)
        assert rows == list(range(calls)) == [state.call for state in states]


def test_another_grid_takes_the_nearest_noise_level_and_says_so_once(unet_pipeline):
    table = StepTable(fitted(10, scheduler_of(timestep_spacing="trailing")))
    scheduler = scheduler_of(timestep_spacing="trailing")
    with pytest.warns(UserWarning, match="fitted for 10 DDIMScheduler calls, running 5 on another grid") as caught:
        rows = [rows_of_run(unet_pipeline(), table, 5, scheduler)[0] for _ in range(2)]
    assert rows == [[0, 2, 4, 6, 8]] * 2
    assert len(caught) == 1


def test_as_many_calls_of_other_levels_are_another_grid(unet_pipeline):
    table = StepTable(fitted(10))
    with pytest.warns(UserWarning, match="calls, running 10 on another grid"):
        rows_of_run(unet_pipeline(), table, 10, scheduler_of(timestep_spacing="trailing"))


def test_the_exact_rule_refuses_another_grid(unet_pipeline):
    with pytest.raises(ConfigError, match="fitted for 10 DDIMScheduler calls, running 5") as caught:
        rows_of_run(unet_pipeline(), StepTable(fitted(10), "exact"), 5)
    assert "Run the scheduler and the number of steps" in caught.value.mend


@pytest.mark.parametrize("rule", ["exact", "nearest"])
def test_outside_a_run_the_last_row_holds_with_one_warning(rule):
    table = StepTable(fitted(6), rule)
    with pytest.warns(UserWarning, match="no sampling run") as caught:
        assert [table.row(), table.row()] == [6, 6]
    assert len(caught) == 1


def test_a_replayed_call_takes_the_row_that_it_had(unet_pipeline):
    table = StepTable(fitted(5), "exact")
    rows, states = rows_of_run(unet_pipeline(), table, 5)
    for row, state in reversed(list(zip(rows, states, strict=True))):
        with fixed_run(state):
            assert current_grid() is None
            assert table.row() == row


def test_a_replayed_call_of_another_grid_takes_the_nearest_level(unet_pipeline):
    scheduler = scheduler_of(timestep_spacing="trailing")
    _, states = rows_of_run(unet_pipeline(), StepTable(fitted(5, scheduler)), 5, scheduler)
    table = StepTable(fitted(10, scheduler))
    with pytest.warns(UserWarning, match="running 5") as caught:
        rows = [row_at(table, state) for state in states]
    assert rows == [0, 2, 4, 6, 8]
    assert len(caught) == 1
    with pytest.raises(ConfigError), fixed_run(states[0]):
        StepTable(table.schedule, "exact").row()


def test_a_replayed_call_does_not_take_the_rows_of_a_live_run_with_its_number(unet_pipeline):
    scheduler = scheduler_of(timestep_spacing="trailing")
    table = StepTable(fitted(10, scheduler))
    _, states = rows_of_run(unet_pipeline(), table, 10, scheduler)
    again = StepTable(table.schedule)
    again._runs[states[3].run] = [0] * 10
    with fixed_run(states[3]):
        assert again.row() == 3


def test_threads_do_not_see_each_others_rows(unet_pipeline):
    pipe = unet_pipeline()
    attach_clock(pipe)
    table = StepTable(fitted(12, scheduler_of(timestep_spacing="trailing")))
    barrier, seen = threading.Barrier(2, timeout=30), {4: [], 6: []}

    def run(steps):
        scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
        own = copy.copy(pipe)
        own.register_modules(scheduler=scheduler)
        attach_clock(own)
        scheduler.set_timesteps(steps)
        latents = torch.zeros(1, 1, 16, 16)
        for timestep in scheduler.timesteps:
            if len(seen[steps]) < 4:
                barrier.wait()  # interleave
            seen[steps] += [table.row()]
            scheduler.step(latents, timestep, latents)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        threads = [threading.Thread(target=contextvars.Context().run, args=(run, steps)) for steps in seen]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == {4: [0, 3, 6, 9], 6: [0, 2, 4, 6, 8, 10]}


def test_the_index_for_compiled_code_is_current_at_every_denoiser_call(unet_pipeline):
    pipe, table = unet_pipeline(), StepTable(fitted(4))
    hook_step_table_(pipe.unet, StepTable(fitted(3)))
    hook_step_table_(pipe.unet, table)  # in place of the earlier one
    seen = []
    pipe.unet.conv_in.register_forward_pre_hook(lambda *_: seen.append(int(table.index)))
    index = table.index
    rows_of_run(pipe, table, 4)
    assert seen == [0, 1, 2, 3]
    assert table.index is index
    unhook_step_tables_(pipe.unet)
    assert not any(
        isinstance(getattr(hook, "__self__", None), StepTable) for hook in pipe.unet._forward_pre_hooks.values()
    )
