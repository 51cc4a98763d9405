from __future__ import annotations

from typing import Any

import pytest
import torch

from dacc import SearchCacheConfig
from dacc.cache.objective import PlanObjective, typical
from dacc.cache.planned import blank_plan
from dacc.cache.profile import count_unit_macs, first_calls
from dacc.cache.units import choose_unit
from dacc.runtime.request import RunRequest

REQUEST = RunRequest(seeds=(1, 2, 3), num_inference_steps=3, guidance_scale=1.0)


def objective_of(pipe: Any, batch_size: int) -> PlanObjective:
    """Of the blocks of a transformer, and of samples in batches."""
    unit = choose_unit(pipe.transformer, "body")
    calls, window = first_calls(pipe, "transformer", REQUEST)
    macs = count_unit_macs(pipe.transformer, (unit,), calls)
    blank = blank_plan(pipe.transformer, (unit,), macs, window.schedule, "", SearchCacheConfig())
    return PlanObjective(pipe, "transformer", blank, window, REQUEST.model_copy(update={"batch_size": batch_size}))


def reusing(objective: PlanObjective) -> Any:
    """A plan that computes at the first call only."""
    return objective.blank.model_copy(update={"codes": dict.fromkeys(objective.blank.codes, "CRR")})


def test_trial_runs_keep_to_the_batch_size_and_find_the_same_error(dit_pipeline):
    whole = objective_of(dit_pipeline(), 3)
    expected = whole.error(reusing(whole))
    pipe, rows = dit_pipeline(), list[int]()
    pipe.transformer.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    objective = objective_of(pipe, 2)
    rows.clear()  # of the profile
    assert objective.error(reusing(objective)) == pytest.approx(expected, rel=1e-4)
    assert rows == [2, 2, 2, 1, 1, 1]


def test_no_sample_outweighs_the_others():
    assert typical(torch.tensor([0.1, 0.2, 0.4])) == pytest.approx(0.2)
    steady, erratic = torch.tensor([0.02, 0.02, 0.02, 0.9]), torch.tensor([0.04, 0.04, 0.04, 0.4])
    assert typical(steady) < typical(erratic)
    assert typical(torch.zeros(3)) == 0
    assert typical(torch.tensor([0.1, float("inf")])) == float("inf")


def test_the_error_of_a_plan_is_what_is_typical_of_its_samples(dit_pipeline):
    objective = objective_of(dit_pipeline(), 3)
    errors = objective.errors(reusing(objective))
    assert errors.shape == (3,)
    assert (errors > 0).all()
    assert objective.error(reusing(objective)) == pytest.approx(float(errors.prod()) ** (1 / 3), rel=1e-4)


def test_runs_that_overflow_have_an_infinite_error(dit_pipeline):
    pipe = dit_pipeline()
    objective = objective_of(pipe, 3)
    pipe.transformer.register_forward_pre_hook(lambda _, args: (args[0] * float("nan"), *args[1:]))
    assert objective.error(reusing(objective)) == float("inf")
