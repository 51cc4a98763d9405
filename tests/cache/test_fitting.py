from __future__ import annotations

import shutil
from typing import Any

import numpy
import pytest
import torch
from diffusers import PNDMScheduler

import dacc
from dacc import SearchCacheConfig, search_cache, verify_bundle
from dacc.cache.fitting import FittedCost, Grams
from dacc.core.cache_plan import CorrectionId, Predictor
from dacc.core.errors import BundleError
from dacc.core.manifest import read_manifest
from dacc.core.schedule_id import schedule_id
from dacc.core.tensor_file import content_hash
from dacc.runtime.cache_units import layout_of
from dacc.runtime.cached import CachedUnits, CachePlanWarning
from dacc.runtime.correction import Correction
from dacc.runtime.forecast import weights
from dacc.runtime.installed import install_plan_
from dacc.runtime.trajectory import sample

from ..runtime.cache_plans import CUT, OUTPUT, blocks, denoiser_of, plan_for
from ..runtime.test_cached import drive, request_of

BODY, CODES = blocks(1, 2), "CFCCFFCF"
WIDTHS = {"body": 64, "deep": 16, "output": 1}
CALLS, CHANNELS, ROWS = 8, 3, 40


def plan_of(pipe: Any, codes: str = CODES, order: int = 2, unit: Any = BODY) -> Any:
    return plan_for(pipe, {unit: codes}, predict={unit.id: Predictor(order=order)})


@pytest.fixture
def values() -> torch.Tensor:
    """(calls, rows, channels) that drift."""
    torch.manual_seed(0)
    steps = torch.randn(CALLS, ROWS, CHANNELS) + torch.linspace(0, 3, CALLS)[:, None, None]
    return steps.cumsum(0)


def grams_of(values: torch.Tensor, targets: torch.Tensor | None = None) -> Grams:
    grams = Grams(places=list(map(float, range(CALLS))))
    for part in (slice(0, 15), slice(15, None)):  # in two batches
        given, wanted = (list(side[:, part]) for side in (values, values if targets is None else targets))
        grams._add("body/x/0", given, wanted)
    return grams


def slow(values: torch.Tensor, history: list[int], call: int, channel: int) -> numpy.ndarray:
    columns = [values[one, :, channel].double().numpy() for one in history] + [numpy.ones(ROWS)]
    return numpy.linalg.lstsq(numpy.stack(columns, 1), values[call, :, channel].double().numpy(), rcond=None)[0]


def test_weights_are_those_of_least_squares_and_early_calls_use_fewer_values(dit_pipeline, values):
    tables = grams_of(values).tables(plan_of(dit_pipeline()), 0.0)
    found, shift = tables["body/x/0.weights"], tables["body/x/0.shift"]
    assert found.shape == (CALLS, 3, CHANNELS)
    for call, history in ((1, [0]), (4, [0, 2, 3]), (5, [0, 2, 3]), (7, [2, 3, 6])):
        for channel in range(CHANNELS):
            wanted = slow(values, history, call, channel)
            numpy.testing.assert_allclose(found[call, 3 - len(history) :, channel], wanted[:-1], rtol=1e-3, atol=1e-4)
            assert shift[call, channel].item() == pytest.approx(wanted[-1], rel=1e-3, abs=1e-3)
            assert not found[call, : 3 - len(history)].any()
    for call in (0, 2, 3, 6):
        assert not found[call].any()


def test_a_strong_ridge_gives_the_polynomial_and_any_fit_is_nearer_to_the_target(dit_pipeline, values):
    plan, grams = plan_of(dit_pipeline()), grams_of(values, values + 0.3)
    for call, history in ((4, [0, 2, 3]), (7, [2, 3, 6])):
        polynomial = weights(list(map(float, history)), float(call), "newton")
        table = grams.tables(plan, 1e9)["body/x/0.weights"][call]
        torch.testing.assert_close(table, torch.tensor(polynomial)[:, None].expand(3, CHANNELS), rtol=1e-4, atol=1e-4)

        def error(ridge: float, call: int = call, history: list[int] = history) -> float:
            tables = grams.tables(plan, ridge)
            rows, shift = tables["body/x/0.weights"][call], tables["body/x/0.shift"][call]
            forecast = sum(row * values[one] for row, one in zip(rows, history, strict=True)) + shift
            return float((forecast - values[call] - 0.3).square().sum())

        errors = [error(ridge) for ridge in (1e9, 0.1, 1e-4)]
        assert errors == sorted(errors, reverse=True)


def test_of_two_calls_at_one_level_the_polynomial_goes_through_the_later(dit_pipeline, values):
    grams = grams_of(values)
    grams.places = [9.0, 8.0, 7.0, 7.0, 6.0, 5.0, 4.0, 3.0]
    table = grams.tables(plan_of(dit_pipeline(), "CCCCFFFF"), 1e9)["body/x/0.weights"][4]
    wanted = torch.tensor([-1.0, 0.0, 2.0])[:, None].expand(3, CHANNELS)  # of calls 1, 2 and 3
    torch.testing.assert_close(table, wanted, rtol=1e-4, atol=1e-4)


def corrected(pipe: Any, plan: Any, tables: dict[str, torch.Tensor]) -> CachedUnits:
    plan = plan.model_copy(update={"correction": CorrectionId(sha256=content_hash(tables))})
    return install_plan_(pipe, denoiser_of(pipe)[0], plan, Correction(tables, plan))


def polynomial_tables(pipe: Any, plan: Any, shift: float = 0.0, places: Any = None) -> dict[str, torch.Tensor]:
    """Weights that do as the polynomial over calls, or `places`, does."""
    places = [float(call) for call in range(plan.calls)] if places is None else places
    unit = plan.units[0].id
    (path,) = layout_of(denoiser_of(pipe)[1], plan.units[0]).kept
    rows = torch.zeros(plan.calls, 3, WIDTHS[unit])
    for call, code in enumerate(plan.codes[unit]):
        history = [place for place in range(call) if plan.codes[unit][place] == "C"][-3:]
        if code == "F":
            own = weights([places[one] for one in history], places[call], "newton")
            rows[call, 3 - len(history) :] = torch.tensor(own)[:, None]
    return {f"{unit}/{path}/0.weights": rows, f"{unit}/{path}/0.shift": torch.full((plan.calls, rows.shape[2]), shift)}


@pytest.mark.parametrize(("kind", "unit"), [("dit_pipeline", BODY), ("unet_pipeline", CUT), ("unet_pipeline", OUTPUT)])
def test_a_run_forecasts_by_the_fitted_weights(request, kind, unit):
    pipe = request.getfixturevalue(kind)()
    plan, asked = plan_of(pipe, unit=unit), request_of(pipe, num_inference_steps=8)
    install_plan_(pipe, denoiser_of(pipe)[0], plan)
    polynomial = sample(pipe, asked).latents
    corrected(pipe, plan, polynomial_tables(pipe, plan))
    torch.testing.assert_close(sample(pipe, asked).latents, polynomial)
    corrected(pipe, plan, polynomial_tables(pipe, plan, shift=0.1))
    assert not torch.allclose(sample(pipe, asked).latents, polynomial)


def test_what_a_fitted_forecast_costs_is_what_least_squares_leave_over(values):
    targets = values + 0.1 * torch.randn_like(values)
    cost = FittedCost(grams_of(values, targets), worth=[float(call) for call in range(CALLS)])
    for history, call in (((0,), 1), ((0, 2, 3), 6), ((1, 4), 7)):
        columns = numpy.stack([values[one].double().numpy().ravel() for one in history], 1)
        wanted = targets[call].double().numpy().ravel()
        (_, left, _, _) = numpy.linalg.lstsq(columns, wanted, rcond=None)
        assert cost(history, call) == pytest.approx(call * float(left[0]) ** 0.5, rel=1e-3)


def test_a_run_that_visits_a_level_twice_forecasts_by_the_fitted_weights(dit_pipeline):
    pipe = dit_pipeline()
    pipe.scheduler = PNDMScheduler(skip_prk_steps=True)
    pipe.scheduler.set_timesteps(7)
    codes, predict = "CCCFCFFF", {"body": Predictor(order=2, x="timestep")}
    plan = plan_for(pipe, {BODY: codes}, predict=predict, grid=schedule_id(pipe.scheduler))
    assert plan.schedule.timesteps[1] == plan.schedule.timesteps[2]
    asked = request_of(pipe, num_inference_steps=7)
    install_plan_(pipe, "transformer", plan)
    polynomial = sample(pipe, asked).latents
    corrected(pipe, plan, polynomial_tables(pipe, plan, places=plan.schedule.timesteps))
    torch.testing.assert_close(sample(pipe, asked).latents, polynomial)
    shifted = polynomial_tables(pipe, plan, places=plan.schedule.timesteps)
    (name,) = (name for name in shifted if name.endswith("shift"))
    shifted[name][3] = 0.1  # at the call whose last three values are of two levels
    corrected(pipe, plan, shifted)
    assert not torch.allclose(sample(pipe, asked).latents, polynomial)


def test_on_other_calls_than_it_was_fitted_for_a_run_continues_by_the_polynomial(unet_pipeline):
    pipe = unet_pipeline()
    plan = plan_of(pipe, unit=CUT)
    install_plan_(pipe, "unet", plan)
    with pytest.warns(CachePlanWarning, match="follows its noise levels"):
        wanted = drive(pipe, 12)
    corrected(pipe, plan, polynomial_tables(pipe, plan, shift=5.0))
    with pytest.warns(CachePlanWarning, match="without the correction of what it skips"):
        assert torch.equal(drive(pipe, 12), wanted)
    assert not torch.allclose(drive(pipe, 8), drive(unet_pipeline(), 8))
    late = drive(pipe, 8, start=4)  # its first call has no history: nothing there was fitted for
    install_plan_(pipe, "unet", plan)
    assert torch.equal(late, drive(pipe, 8, start=4))


def test_tables_of_another_shape_are_refused(dit_pipeline):
    pipe = dit_pipeline()
    plan = plan_of(pipe)
    good = polynomial_tables(pipe, plan)
    (name,) = (name for name in good if name.endswith("weights"))
    stem = name.removesuffix(".weights")
    for bad in (
        {name: good[name]},
        {**good, f"{stem}.shift": torch.zeros(plan.calls, 3)},
        {**good, name: good[name][:4]},
        {**good, name: good[name][:, 0]},
    ):
        with pytest.raises(BundleError, match="does not fit"):
            corrected(pipe, plan, bad)


def test_fits_against_the_float_network_bring_a_quantized_one_nearer_and_travel_with_the_bundle(
    unet_folder, bundle_of, tmp_path
):
    source = shutil.copytree(bundle_of(unet_folder, bits=3), tmp_path / "near")
    shutil.copytree(unet_folder, tmp_path / unet_folder.name)
    fields = {"macs_ratio": 0.45, "steps": 8, "samples": 2, "measure": "never", "method": "taylor"}
    found = {}
    for correct in (True, False):
        config = SearchCacheConfig(**fields, settings={"correct": correct, "trials": 12})
        bundle = search_cache(source, config, output=tmp_path / f"{correct}", device="cpu")
        found[correct] = read_manifest(bundle).components["unet"].cache
        assert verify_bundle(bundle) == []
        assert (bundle / "unet" / "dacc_cache.safetensors").is_file() == ("ridge" in found[correct].chosen)
        dacc.load(bundle, device="cpu")
    assert "ridge" in found[True].chosen
    assert found[True].plan.correction is not None
    assert found[False].plan.correction is None
    assert found[True].chosen["relative_l2"] < found[False].chosen["relative_l2"]
