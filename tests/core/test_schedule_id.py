import math

import pytest

from dacc.core.schedule_id import NoiseGrid, ScheduleId, nearest_calls, same_levels, schedule_id

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 inside diffusers

diffusers = pytest.importorskip("diffusers")


def _identify(scheduler, steps: int) -> ScheduleId:
    scheduler.set_timesteps(steps)
    return schedule_id(scheduler)


def test_equal_grids_have_equal_identities() -> None:
    first, second = (_identify(diffusers.DDIMScheduler(), 10) for _ in range(2))
    assert first == second
    assert first.sha256 == second.sha256
    assert first.short == first.sha256[:12]


@pytest.mark.parametrize(
    ("other", "steps"),
    [
        (diffusers.DDIMScheduler(), 11),
        (diffusers.DDIMScheduler(beta_schedule="scaled_linear"), 10),
        (diffusers.EulerDiscreteScheduler(), 10),
    ],
)
def test_steps_config_and_class_change_the_identity(other, steps: int) -> None:
    assert _identify(other, steps).sha256 != _identify(diffusers.DDIMScheduler(), 10).sha256


def test_the_identity_survives_json() -> None:
    before = _identify(diffusers.HeunDiscreteScheduler(), 5)
    assert ScheduleId.model_validate_json(before.model_dump_json()).sha256 == before.sha256


def test_last_bits_of_the_grid_do_not_count() -> None:
    before = _identify(diffusers.EulerDiscreteScheduler(), 5)
    moved = tuple(value * (1 + 1e-9) for value in before.timesteps)
    assert before.model_copy(update={"timesteps": moved}).sha256 == before.sha256


def test_sigmas_come_from_alphas_when_the_scheduler_lists_none() -> None:
    scheduler = diffusers.DDIMScheduler()
    identity = _identify(scheduler, 4)
    alpha = scheduler.alphas_cumprod[int(identity.timesteps[0])].item()
    assert identity.sigmas is not None
    assert identity.sigmas[0] == pytest.approx(math.sqrt((1 - alpha) / alpha))


def test_nearest_calls_map_another_step_count_by_noise_level() -> None:
    fitted, running = (_identify(diffusers.DDIMScheduler(timestep_spacing="trailing"), steps) for steps in (10, 5))
    assert nearest_calls(fitted, fitted) == list(range(10))
    assert nearest_calls(fitted, running) == [0, 2, 4, 6, 8]


def test_grids_are_compared_by_their_noise_levels() -> None:
    fitted = _identify(diffusers.DDIMScheduler(), 10)
    assert same_levels(fitted, NoiseGrid(fitted.timesteps, fitted.sigmas))
    assert same_levels(fitted, NoiseGrid(fitted.timesteps))
    assert same_levels(fitted, fitted.model_copy(update={"scheduler": "Other"}))
    assert not same_levels(fitted, NoiseGrid(fitted.timesteps, tuple(2 * level for level in fitted.sigmas or ())))
    assert not same_levels(fitted, _identify(diffusers.DDIMScheduler(), 9))


def test_one_bit_of_a_level_makes_no_other_grid_wherever_it_would_be_rounded() -> None:
    """Euler, 50 steps of Stable Diffusion, on two processors: 0.791262 and 0.791261 with six digits."""
    one, other = (NoiseGrid((401.0, 381.0), (0.85, sigma)) for sigma in (0.7912615537643433, 0.7912614941596985))
    assert same_levels(one, other)
    low = (NoiseGrid((0.0,), (sigma,)) for sigma in (0.0100005, 0.0100035))  # one bit of alpha, linear betas
    assert same_levels(*low)
    fitted = _identify(diffusers.EulerDiscreteScheduler(), 50)
    for factor, same in ((1 + 1e-6, True), (1 - 1e-6, True), (1 + 1e-3, False)):
        moved = NoiseGrid(fitted.timesteps, tuple(factor * level for level in fitted.sigmas or ()))
        assert same_levels(fitted, moved) is same


def test_grids_of_other_lengths_are_others() -> None:
    assert not same_levels(NoiseGrid((3.0, 2.0)), NoiseGrid((3.0, 2.0, 1.0)))
    assert not same_levels(NoiseGrid((3.0,), (1.0,)), NoiseGrid((3.0,), ()))
