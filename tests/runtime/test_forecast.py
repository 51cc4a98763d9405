from __future__ import annotations

import gc
import weakref
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from dacc.core.cache_plan import Predictor
from dacc.runtime.cached import CachePlanWarning
from dacc.runtime.clock import RunState, run_storage
from dacc.runtime.forecast import History, abscissa, combined, weights
from dacc.runtime.trajectory import capture_calls, sample

from .cache_plans import CUT, blocks, denoiser_of, module
from .test_cached import EVERY_UNIT, FLUX, installed, request_of, run_grid

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 inside diffusers
UNEVEN = (0.0, 1.0, 4.0, 6.0, 11.0)
KEY = ("body", "block")


def forecast(form: str, order: int, values: Any, places: tuple[float, ...], place: float) -> float:
    """Of a function of the places, through a history."""
    history = History({KEY: Predictor(order=order, form=form, x="timestep")})
    for own in places:
        history.add(KEY, at(own), torch.tensor(float(values(own))))
    return history.forecast(KEY, at(place)).item()


def at(timestep: float) -> RunState:
    return RunState(1, 0, 10, 0, 10, timestep, None)


@pytest.mark.parametrize("form", ["newton", "published"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_straight_lines_are_forecast_exactly_at_uneven_distances(form, order):
    for number in range(2, 6):
        found = forecast(form, order, lambda x: 3 * x - 7, UNEVEN[:number], 13.0)
        assert found == pytest.approx(3 * 13 - 7, abs=1e-4)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_newton_is_exact_for_polynomials_of_its_order_at_uneven_distances(order):
    found = forecast("newton", order, lambda x: (x / 4 - 1) ** order + x, UNEVEN, 13.0)
    assert found == pytest.approx((13 / 4 - 1) ** order + 13, rel=1e-5)


def test_the_published_recurrence_gives_what_it_gives_on_squares_and_newton_is_right():
    assert forecast("published", 2, lambda x: x * x, (0.0, 5.0, 10.0), 12.0) == 134
    assert forecast("newton", 2, lambda x: x * x, (0.0, 5.0, 10.0), 12.0) == pytest.approx(144, rel=1e-6)


def test_the_published_recurrence_equals_factors_that_are_updated_call_by_call():
    """Slow and obvious: the factors themselves, of all computed calls, cut at the order."""
    generator, order = torch.manual_seed(0), 3
    values = torch.randn(len(UNEVEN), 7, dtype=torch.float64, generator=generator)
    factors: list[torch.Tensor] = []
    for number, own in enumerate(UNEVEN):
        fresh = [values[number]]
        for old in factors[:order]:
            fresh.append((fresh[-1] - old) / (own - UNEVEN[number - 1]))
        factors = fresh[: order + 1]
    distance = 2.0
    expected = factors[0] + factors[1] * distance + factors[2] * distance**2 / 2 + factors[3] * distance**3 / 6
    numbers = weights(UNEVEN[-order - 1 :], UNEVEN[-1] + distance, "published")
    assert torch.allclose(combined(numbers, list(values[-order - 1 :])), expected, atol=1e-12)


@pytest.mark.parametrize("form", ["newton", "published"])
def test_numbers_add_up_to_one_and_a_steady_value_stays_bit_for_bit(form):
    for count in range(1, 6):
        assert sum(map(Fraction, weights(UNEVEN[:count], 13.0, form))) == pytest.approx(1)
    steady = torch.randn(50, generator=torch.manual_seed(0)).bfloat16()
    assert torch.equal(combined(weights(UNEVEN, 13.0, form), [steady] * 5), steady)


def test_with_fewer_values_the_order_is_what_they_allow():
    for count, expected in ((1, 0.0), (2, 12.0), (3, 144.0)):  # of squares, whose first values are 0 and 1
        assert forecast("newton", 2, lambda x: x * x, (0.0, 1.0, 2.0)[:count], 12.0) == pytest.approx(expected)


def test_a_value_at_the_same_place_takes_the_place_of_the_first():
    history = History({KEY: Predictor(order=1, x="timestep")})
    for place, value in ((0.0, 0.0), (1.0, 50.0), (1.0, 2.0)):
        history.add(KEY, at(place), torch.tensor(value))
    assert history.count(KEY) == 2
    assert history.forecast(KEY, at(2.0)).item() == 4


def test_nested_tuples_keep_their_form_and_types():
    def value(number: float) -> Any:
        return torch.full((2,), number).bfloat16(), (torch.tensor([number]), None), torch.tensor([7])

    found = combined(weights([0.0, 2.0], 3.0, "newton"), [value(1.0), value(5.0)])
    assert found[0].dtype == torch.bfloat16
    assert (found[0].tolist(), found[1][0].tolist(), found[1][1], found[2].tolist()) == ([7, 7], [7], None, [7])


@EVERY_UNIT
def test_a_forecast_call_is_the_evaluation_with_continued_values(request, kind, unit):
    check_forecast(request.getfixturevalue(kind)(), unit, "call")


@pytest.mark.parametrize("x", ["sigma", "timestep"])
@pytest.mark.parametrize(("kind", "unit"), [("unet_pipeline", CUT), ("dit_pipeline", blocks(1, 2))])
def test_forecasts_run_over_noise_levels_too(request, kind, unit, x):
    check_forecast(request.getfixturevalue(kind)(), unit, x)


def check_forecast(pipe: Any, unit: Any, x: Any) -> None:
    """Slow and obvious: the values of two calls by hand, a line through them, and the third evaluation on it."""
    units = installed(pipe, {unit: "CCFF"}, rule="exact", grid=run_grid(pipe), predict={unit.id: Predictor(x=x)})
    name, denoiser = denoiser_of(pipe)
    outputs: list[torch.Tensor] = []
    handle = denoiser.register_forward_hook(lambda *found: outputs.append(found[2][0]))
    calls = capture_calls(pipe, request_of(pipe), components=[name])
    handle.remove()
    known: list[dict[Any, Any]] = [{}, {}]
    for number in (0, 1):
        with units.recording(known[number]):
            calls[number].replay(denoiser)
    first, second, third = ([call.state.call, call.state.sigma, call.state.timestep] for call in calls[:3])
    place = ["call", "sigma", "timestep"].index(x)
    share = (third[place] - second[place]) / (second[place] - first[place])

    def continued(newest: Any, older: Any) -> Any:
        return newest + share * (newest - older) if isinstance(newest, torch.Tensor) else newest

    kept = units.layouts[unit.id].kept
    values = {
        key: tree_map(continued, newest, known[0][key]) if key[1] in kept else newest
        for key, newest in known[1].items()
    }
    with units.reusing(values, [unit.id]):
        expected = calls[2].replay(denoiser)[0]
    assert torch.allclose(outputs[2], expected, atol=1e-5, rtol=1e-4)
    with units.reusing(known[1], [unit.id]):
        assert not torch.allclose(outputs[2], calls[2].replay(denoiser)[0], atol=1e-6)


@EVERY_UNIT
def test_with_one_computed_value_a_forecast_is_a_reuse(request, kind, unit):
    pipe = request.getfixturevalue(kind)()
    grid = run_grid(pipe)
    installed(pipe, {unit: "CRRR"}, rule="exact", grid=grid)
    reused = sample(pipe, request_of(pipe)).latents
    installed(pipe, {unit: "CFFF"}, rule="exact", grid=grid, predict={unit.id: Predictor(order=2)})
    assert torch.equal(sample(pipe, request_of(pipe)).latents, reused)


def test_each_guidance_branch_is_forecast_from_its_own_values(flux_pipeline):
    pipe = flux_pipeline()
    request = request_of(pipe, guidance_scale=3.0, prompts=("a red circle",), seeds=(1,))
    unit = blocks(0, 2, *FLUX)
    units = installed(pipe, {unit: "CCFF"}, grid=run_grid(pipe), predict={"body": Predictor()})
    outputs: list[torch.Tensor] = []
    pipe.transformer.register_forward_hook(lambda *found: outputs.append(found[2][0]))
    calls = capture_calls(pipe, request)
    outputs = outputs[:8]
    assert [call.state.evaluation for call in calls] == [0, 1] * 4
    for branch in (0, 1):
        known: list[dict[Any, Any]] = [{}, {}]
        for number in (0, 1):
            with units.recording(known[number]):
                calls[2 * number + branch].replay(pipe.transformer)
        values = {key: tree_map(_line, value, known[0][key]) for key, value in known[1].items()}
        with units.reusing(values, ["body"]):
            expected = calls[4 + branch].replay(pipe.transformer)[0]
        assert torch.allclose(outputs[4 + branch], expected, atol=1e-5, rtol=1e-4)


def _line(newest: Any, older: Any) -> Any:
    return 2 * newest - older if isinstance(newest, torch.Tensor) else newest


def test_no_more_values_are_kept_than_later_calls_look_at(unet_pipeline):
    pipe = unet_pipeline()
    key, counts = ("deep", "up_blocks.1.resnets.0"), []
    refs: list[Any] = []
    installed(pipe, {CUT: "CCCCFCFCRC"}, predict={"deep": Predictor(order=2)})
    pipe.scheduler.set_timesteps(10)
    latents = torch.zeros(1, 1, 16, 16)
    with torch.no_grad():
        for timestep in pipe.scheduler.timesteps:
            output = pipe.unet(latents, timestep).sample
            branch = next(value for value in run_storage().values() if hasattr(value, "history"))
            counts.append(branch.history.count(key))
            refs += [weakref.ref(leaf) for leaf in tree_leaves(list(branch.values.values()))]
            pipe.scheduler.step(output, timestep, latents)
    assert counts == [0, 1, 2, 3, 2, 3, 0, 1, 0, 0]
    del branch
    gc.collect()
    assert not [ref for ref in refs if ref() is not None]


def test_a_run_that_begins_in_the_middle_computes_and_then_forecasts_with_what_it_has(unet_pipeline):
    from .test_cached import Recorder, drive

    pipe = unet_pipeline()
    recorder = Recorder(pipe.unet.mid_block.resnets[0])
    installed(pipe, {CUT: "CCFFFCFF"}, predict={"deep": Predictor(order=2)})
    drive(pipe, 8, start=3)
    assert recorder.calls == [3, 5]


def test_a_scheduler_without_sigmas_is_followed_by_its_timesteps_and_that_is_said(unet_pipeline, monkeypatch):
    state = RunState(1, 3, 10, 3, 10, 500.0, None)
    assert [abscissa(Predictor(x=x), state) for x in ("sigma", "call")] == [500.0, 3.0]
    pipe = unet_pipeline()
    installed(pipe, {CUT: "CCFF"}, predict={"deep": Predictor(x="sigma")})
    monkeypatch.setattr(
        "dacc.runtime.clockwork.read_grid", lambda scheduler: (tuple(scheduler.timesteps.tolist()), None)
    )
    with pytest.warns(CachePlanWarning, match="no sigmas"):
        sample(pipe, request_of(pipe))


def test_forecasts_of_a_module_inside_a_skipped_range_look_at_its_own_computed_calls(dit_pipeline):
    """The inner unit is not evaluated at calls 1 and 2 and continues the line of calls 0 and 3."""
    pipe = dit_pipeline()
    inner = module("transformer_blocks.1.ff")
    units = installed(pipe, {blocks(0, 2): "CRRCCC", inner: "CCCCFC"}, predict={inner.id: Predictor()})
    rows = units._rows(units.plan, units.plan.schedule)
    assert [row.actions[inner.id] for row in rows] == list("C--CFC")
    assert [row.needed.get(inner.id, 0) for row in rows] == [1, 1, 1, 2, 0, 0]
    assert torch.isfinite(sample(pipe, request_of(pipe, num_inference_steps=6)).latents).all()
