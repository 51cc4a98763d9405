from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from dacc import SearchCacheConfig
from dacc.cache.config import METHODS
from dacc.cache.evolution import evolve_component
from dacc.cache.fitting import fitted_plan
from dacc.cache.forecast_cost import forecast_cost
from dacc.cache.planned import blank_plan
from dacc.cache.profile import count_unit_macs, first_calls
from dacc.cache.search import Found, search_component
from dacc.cache.units import choose_unit
from dacc.core.cache_plan import Predictor
from dacc.core.errors import UnsupportedError
from dacc.core.reporter import Reporter
from dacc.core.seeds import seed_stream
from dacc.runtime.compare import relative_l2
from dacc.runtime.correction import Correction
from dacc.runtime.installed import no_cache
from dacc.runtime.request import RunRequest
from dacc.runtime.trajectory import sample

from ..runtime.test_cached_situations import wan_pipeline

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 inside diffusers
REQUEST = RunRequest(seeds=(1,), num_inference_steps=8, guidance_scale=2.0, height=16, width=16, num_frames=5)
SHORT = {"gated": {"warmup": 1}, "taylor": {"trials": 12}, "evolve": {"generations": 1, "population": 4}}
OWN = {"transformer": range(4), "transformer_2": range(4, 8)}


class Worded(diffusers.WanPipeline):
    """Without a text encoder."""

    def encode_prompt(self, prompt: list[str], *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        words = torch.linspace(-1, 1, len(prompt) * 4 * 8).reshape(len(prompt), 4, 8)
        return words, -words


@pytest.fixture
def pipe() -> Any:
    """Two denoisers, each for its own noise."""
    made = wan_pipeline()
    made.vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    found = Worded(**made.components, boundary_ratio=made.config.boundary_ratio)
    found.set_progress_bar_config(disable=True)
    return found


def search(pipe: Any, component: str, method: str, reporter: Reporter, **fields: Any) -> Found:
    config = SearchCacheConfig(macs_ratio=0.9, method=method, steps=8, **fields)
    arguments = pipe, component, config, METHODS.load(method), REQUEST, "", reporter
    if method == "evolve":
        return evolve_component(*arguments, None, SimpleNamespace(load=lambda: None, save=lambda _: None))
    return search_component(*arguments)


@pytest.mark.parametrize("component", OWN)
def test_the_first_call_and_the_number_of_calls_are_the_denoisers_own(pipe, component):
    calls, window = first_calls(pipe, component, REQUEST)
    own = OWN[component]
    assert (window.first, window.calls, len(window.grid.timesteps)) == (own.start, len(own), 8)
    assert [call.state.call for call in calls] == [own.start] * 2  # both guidance branches
    assert window.schedule.timesteps == window.grid.timesteps[own.start : own.stop]


@pytest.mark.parametrize(
    ("method", "component"),
    [*product(["deepcache", "dp", "taylor"], OWN), ("gated", "transformer_2"), ("evolve", "transformer_2")],
)
def test_each_of_two_denoisers_gets_a_plan_of_its_own_calls(pipe, method, component):
    reporter = Reporter(quiet=True)
    found = search(pipe, component, method, reporter, settings=SHORT.get(method, {}))
    record, own = found.record, OWN[component]
    assert record.chosen["calls"] == len(own)
    assert record.macs_ratio <= 0.9
    assert not [notice for notice in reporter.notices if "MACs" in notice]  # as predicted
    for codes in record.plan.codes.values():
        assert len(codes) == 8
        assert {code for call, code in enumerate(codes) if call not in own} == {"C"}
        assert codes[own.start] == "C"
    assert any(set(codes) != {"C"} for codes in record.plan.codes.values())
    found.install_(pipe, component)
    deciding = REQUEST.model_copy(update={"seeds": seed_stream("trials", 0, 1)})
    cached = sample(pipe, deciding).latents
    with no_cache(pipe):
        error = relative_l2(sample(pipe, deciding).latents, cached).mean().item()
    assert 0 < error < 0.5
    if method == "taylor":
        assert error == pytest.approx(record.chosen["relative_l2"], rel=1e-3)


def test_forecasts_are_fitted_from_the_own_calls_on(pipe, monkeypatch):
    reporter, predictor = Reporter(quiet=True), Predictor(order=2)
    component, own = "transformer_2", OWN["transformer_2"]
    calls, window = first_calls(pipe, component, REQUEST)
    unit = choose_unit(pipe.transformer_2, "auto")
    macs = count_unit_macs(pipe.transformer_2, (unit,), calls)
    blank = blank_plan(pipe.transformer_2, (unit,), macs, window.schedule, "", SearchCacheConfig())
    cost = forecast_cost(pipe, component, blank, window, REQUEST, predictor, reporter, fit=True)
    plan = blank.model_copy(update={"codes": {unit.id: "CFCF"}, "predict": {unit.id: predictor}})
    found = []
    forecast = Correction.forecast

    def watched(self: Correction, name: str, path: str, call: int, values: Any) -> Any:
        found.append((call, len(values)))
        return forecast(self, name, path, call, values)

    monkeypatch.setattr(Correction, "forecast", watched)
    window.install_(pipe, component, *fitted_plan(plan, cost.grams, 1e-4))
    sample(pipe, REQUEST)
    assert sorted(set(found)) == [(own.start + 1, 1), (own.start + 3, 2)]


def test_a_denoiser_that_no_step_reaches_is_refused_with_advice(pipe):
    pipe.register_to_config(boundary_ratio=0.0)
    with pytest.raises(UnsupportedError, match="transformer_2 is not called in a run of 8 steps.*--component"):
        first_calls(pipe, "transformer_2", REQUEST)
