from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler

import dacc
from dacc import SearchCacheConfig, search_cache
from dacc.cache.forecast_cost import ForecastCost, squared_distances
from dacc.core.manifest import read_manifest
from dacc.runtime.compare import relative_l2
from dacc.runtime.forecast import combined, weights
from dacc.runtime.request import RunRequest
from dacc.runtime.trajectory import sample

SEARCH = {"method": "taylor", "steps": 12, "samples": 2, "macs_ratio": 0.6, "measure": "never"}


def test_distances_are_those_of_the_values():
    values = 100 + torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(squared_distances(values), torch.cdist(values.double(), values.double()).square())


@pytest.mark.parametrize("form", ["newton", "published"])
@pytest.mark.parametrize("history", [(0,), (1, 3), (0, 2, 3)])
def test_the_error_of_a_forecast_follows_from_distances(form, history):
    values = torch.randn(6, 40, generator=torch.Generator().manual_seed(1)).cumsum(0)
    places = [1.0, 0.7, 0.5, 0.3, 0.2, 0.1]
    targets = values + 0.1 * torch.randn(6, 40, generator=torch.Generator().manual_seed(2))
    squares = squared_distances(torch.cat([values, targets]))
    cost = ForecastCost(squares[:6, :6].tolist(), squares[:6, 6:].tolist(), places, [2.0] * 6, form)
    numbers = weights([places[one] for one in history], places[4], form)
    apart = combined(numbers, [values[one] for one in history]) - targets[4]
    assert cost.squared_error(history, 4) == pytest.approx(float(apart.double().square().sum()), rel=1e-4)
    assert cost(history, 4) == pytest.approx(2 * float(apart.norm()), rel=1e-4)


@pytest.mark.parametrize("form", ["newton", "published"])
def test_of_two_calls_at_one_level_the_later_counts(form):
    """As PNDM visits them. Before, published divided by 0, and the weights of newton added up to 5."""
    values = torch.randn(4, 40, generator=torch.Generator().manual_seed(1)).cumsum(0)
    squares = squared_distances(values).tolist()
    cost = ForecastCost(squares, squares, [981.0, 961.0, 961.0, 941.0], [1.0] * 4, form)
    line = 2 * values[2] - values[0]
    assert cost.squared_error((0, 1, 2), 3) == pytest.approx(
        float((line - values[3]).double().square().sum()), rel=1e-4
    )
    assert cost.squared_error((1, 2), 3) == pytest.approx(squares[2][3], rel=1e-4)
    assert weights([981.0, 961.0, 961.0], 941.0, form) == [-1.0, 0.0, 2.0]


@pytest.mark.parametrize(("x", "form"), [("timestep", "published"), ("sigma", "newton")])
def test_solvers_that_visit_a_level_twice_are_searched_for(dit_pipeline, tmp_path, x, form):
    pipe = dit_pipeline()
    pipe.scheduler = PNDMScheduler(skip_prk_steps=True)
    pipe.save_pretrained(tmp_path / "pndm")
    config = SearchCacheConfig(**{**SEARCH, "steps": 8}, settings={"x": x, "form": form, "order": 2, "trials": 8})
    bundle = search_cache(tmp_path / "pndm", config, output=tmp_path / "found", device="cpu")
    record = read_manifest(bundle).components["transformer"].cache
    assert record.plan.calls == 9
    assert 0 < record.chosen["relative_l2"] < 1


@pytest.fixture
def plans(dit_folder, tmp_path):
    def plan(name: str, **settings: Any):
        config = SearchCacheConfig(**SEARCH, settings=settings)
        bundle = search_cache(dit_folder, config, output=tmp_path / name, device="cpu")
        return bundle, read_manifest(bundle).components["transformer"].cache

    return plan


def test_a_searched_plan_is_nearer_than_an_even_one_of_the_same_cost(plans, dit_folder):
    found, even = plans("searched"), plans("even", spacing="even", warmup=2)
    assert found[1].macs_ratio == even[1].macs_ratio
    assert found[1].plan.codes != even[1].plan.codes
    request = RunRequest(seeds=tuple(range(8)), num_inference_steps=12, batch_size=8)
    wanted = sample(dacc.load(dit_folder, device="cpu"), request).latents
    errors = [
        relative_l2(wanted, sample(dacc.load(bundle, device="cpu"), request).latents).mean()
        for bundle, _ in (found, even)
    ]
    assert errors[0] < errors[1]


def test_the_same_search_places_the_same_calls(plans):
    assert plans("one")[1].plan == plans("other")[1].plan
