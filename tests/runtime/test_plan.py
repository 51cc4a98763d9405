from __future__ import annotations

import inspect
from typing import Any

import pytest
from diffusers import DDIMInverseScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler

from dacc.core.cache_plan import CacheRecord, Predictor, UnitMacs
from dacc.core.errors import BundleError, ConfigError, ModelError
from dacc.core.schedule_id import NoiseGrid, read_grid, schedule_id
from dacc.runtime.plan import check_model, check_record, codes_on, plan_rows, planned_macs

from .cache_plans import CUT, module, plan_for

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 inside diffusers
SEARCHED = "CCRRRCRRRRCRRRRCRRRR"  # of 20 calls, 5 of them computed


def grid(scheduler: Any, steps: int) -> NoiseGrid:
    scheduler.set_timesteps(steps)
    return NoiseGrid(*read_grid(scheduler))


def record(plan: Any, written: Any = None) -> CacheRecord:
    """A record whose plan was `written` at first."""
    return CacheRecord(method="dp", plan=plan, plan_sha256=(written or plan).sha256(), macs_ratio=0.5)


@pytest.fixture
def pipe(unet_pipeline):
    return unet_pipeline()


def test_on_its_own_grid_a_plan_is_what_it_says(pipe):
    plan = plan_for(pipe, {CUT: SEARCHED})
    assert codes_on(plan, grid(pipe.scheduler, 20)) == {"deep": SEARCHED}


@pytest.mark.parametrize(("steps", "computed"), [(40, 5), (10, 5), (80, 5)])
def test_on_another_grid_every_stretch_of_noise_keeps_its_computed_calls(pipe, steps, computed):
    pipe.scheduler = DDIMScheduler(timestep_spacing="trailing")
    codes = codes_on(plan_for(pipe, {CUT: SEARCHED}), grid(pipe.scheduler, steps))["deep"]
    assert len(codes) == steps
    assert codes[0] == "C"
    assert codes.count("C") == computed


def test_fewer_calls_never_reuse_across_a_call_that_the_search_computed(pipe):
    """Slow and obvious: between two calls of the new grid lies a computed one exactly where the later call computes."""
    plan = plan_for(pipe, {CUT: SEARCHED})
    running = grid(pipe.scheduler, 13)
    codes = codes_on(plan, running)["deep"]
    searched = plan.schedule.timesteps
    nearest = [min(range(20), key=lambda call: abs(searched[call] - level)) for level in running.timesteps]
    for call in range(1, 13):
        passed = [SEARCHED[place] for place in range(nearest[call - 1] + 1, nearest[call] + 1)]
        assert (codes[call] == "C") == ("C" in passed)


def test_a_short_run_goes_without_and_an_exact_plan_refuses(pipe):
    other = grid(pipe.scheduler, 5)
    assert codes_on(plan_for(pipe, {CUT: SEARCHED}), other) is None
    with pytest.raises(ConfigError, match="20 DDIMScheduler calls, running 5.*exact"):
        codes_on(plan_for(pipe, {CUT: SEARCHED}, rule="exact"), other)


def test_a_short_plan_serves_its_own_grid(pipe):
    assert codes_on(plan_for(pipe, {CUT: "CR"}), grid(pipe.scheduler, 2)) == {"deep": "CR"}


def test_a_corrector_does_not_reuse_its_own_predictor_unless_searched_so(pipe):
    heun = HeunDiscreteScheduler()
    codes = codes_on(plan_for(pipe, {CUT: "CR" * 10}), grid(heun, 10), order=2)["deep"]
    assert not [call for call in range(1, len(codes), 2) if codes[call - 1 : call + 1] == "CR"]
    heun.set_timesteps(4)
    plan = plan_for(pipe, {CUT: "CRCRCRC"}, grid=schedule_id(heun))
    assert codes_on(plan, grid(heun, 4), order=2) == {"deep": "CRCRCRC"}


def test_a_corrector_reuses_its_predictor_with_other_steps_of_the_solver_that_was_searched(pipe):
    heun = HeunDiscreteScheduler()
    heun.set_timesteps(20)
    plan = plan_for(pipe, {CUT: "CR" * 19 + "C"}, grid=schedule_id(heun))
    running = grid(heun, 19)
    assert codes_on(plan, running, order=2, solver="HeunDiscreteScheduler")["deep"].startswith("CR")
    assert codes_on(plan, running, order=2, solver="KDPM2DiscreteScheduler")["deep"].startswith("CC")


def test_where_noise_rises_calls_compute(pipe):
    codes = codes_on(plan_for(pipe, {CUT: SEARCHED}), grid(DDIMInverseScheduler(), 20))["deep"]
    assert codes == "C" * 20


def test_a_flow_grid_is_followed_by_its_sigmas(flux_pipeline):
    pipe = flux_pipeline()
    codes = codes_on(plan_for(pipe, {module("x"): SEARCHED}), grid(FlowMatchEulerDiscreteScheduler(), 40))["x"]
    assert codes.count("C") == 5


def test_a_unit_inside_a_skipped_one_is_not_evaluated_and_values_live_until_their_last_use():
    rows = plan_rows({"outer": "CRRC", "inner": "CCRR"}, {"outer": frozenset(), "inner": frozenset({"outer"})})
    assert [row.actions["outer"] for row in rows] == list("CRRC")
    assert [row.actions["inner"] for row in rows] == list("C--R")
    assert [sorted(row.needed) for row in rows] == [["inner", "outer"], ["inner", "outer"], ["inner"], []]


def test_a_forecast_needs_as_many_values_as_it_looks_at_and_saves_what_a_reuse_saves(pipe):
    rows = plan_rows({"deep": "CCCFCRCF"}, {"deep": frozenset()}, {"deep": 3})
    assert [row.needed.get("deep", 0) for row in rows] == [1, 2, 3, 1, 2, 2, 3, 0]
    fields = {"macs": UnitMacs(full=100, units={"deep": 70}), "predict": {"deep": Predictor(order=2)}}
    assert planned_macs(plan_for(pipe, {CUT: "CCFRCF"}, **fields), {"deep": frozenset()}) == 600 - 3 * 70


def test_on_another_grid_calls_are_skipped_as_around_there(pipe):
    plan = plan_for(pipe, {CUT: "CCFFFCFFFFCRRRRCRRRR"}, predict={"deep": Predictor()})
    codes = codes_on(plan, grid(DDIMScheduler(timestep_spacing="trailing"), 40))["deep"]
    assert codes.count("C") == 5
    assert set(codes[:20]) == {"C", "F"}
    assert set(codes[22:]) == {"C", "R"}


def test_a_forecast_without_a_predictor_and_one_at_the_first_call_are_refused(pipe):
    with pytest.raises(ValueError, match="nothing says how"):
        plan_for(pipe, {CUT: "CF"})
    with pytest.raises(ValueError, match="at the first call"):
        plan_for(pipe, {CUT: "FC"}, predict={"deep": Predictor()})
    with pytest.raises(ValueError, match="predict is of"):
        plan_for(pipe, {CUT: "CR"}, predict={"other": Predictor()})


def test_macs_of_nested_units_are_saved_once(pipe):
    outer, inner = module("outer"), module("inner")
    plan = plan_for(pipe, {outer: "CRCR", inner: "CRRC"}, macs=UnitMacs(full=100, units={"outer": 70, "inner": 30}))
    nested = {"outer": frozenset(), "inner": frozenset({"outer"})}
    assert planned_macs(plan, nested) == 400 - 70 - 30 - 70
    apart = {"outer": frozenset(), "inner": frozenset()}
    assert planned_macs(plan, apart) == 400 - 2 * 70 - 2 * 30


def test_a_plan_for_another_model_is_refused_by_what_differs(pipe, dit_pipeline):
    plan = plan_for(pipe, {CUT: "CR"})
    check_model(plan, "unet", pipe.unet)
    with pytest.raises(ModelError, match="for a UNet2DModel; this is a DiTTransformer2DModel"):
        check_model(plan, "transformer", dit_pipeline().transformer)
    other = type(pipe.unet).from_config({**pipe.unet.config, "sample_size": 32})
    with pytest.raises(ModelError, match="another config"):
        check_model(plan, "unet", other)


def test_a_plan_fits_a_later_diffusers_whose_configs_have_more_fields(pipe, monkeypatch):
    plan = plan_for(pipe, {CUT: "CR"})
    signature = inspect.signature(type(pipe.unet).__init__)
    field = inspect.Parameter("new_option", inspect.Parameter.KEYWORD_ONLY, default=(1, 2))
    later = signature.replace(parameters=[*signature.parameters.values(), field])
    monkeypatch.setattr(type(pipe.unet).__init__, "__signature__", later, raising=False)
    pipe.unet.register_to_config(new_option=[1, 2])  # as it comes from a file
    check_model(plan, "unet", pipe.unet)
    pipe.unet.register_to_config(new_option=[1, 3])
    with pytest.raises(ModelError, match="another config"):
        check_model(plan, "unet", pipe.unet)


def test_an_edited_plan_other_weights_and_a_newer_format_are_refused(pipe):
    plan = plan_for(pipe, {CUT: "CRCR"}, weights="a" * 64)
    check_record(record(plan), "unet", ("a" * 64, "b" * 64))
    edited = plan.model_copy(update={"codes": {"deep": "CRRR"}})
    with pytest.raises(BundleError, match="was edited"):
        check_record(record(edited, plan), "unet", ("a" * 64,))
    with pytest.raises(ModelError, match="other weights.*aaaaaaaaaaaa.*bbbb"):
        check_record(record(plan), "unet", ("b" * 64,))
    newer = plan.model_copy(update={"format": 2})
    with pytest.raises(BundleError, match="format 2"):
        check_record(record(newer), "unet", ("a" * 64,))
