"""The full-size denoisers are the published ones in everything but their weights."""

import pytest
import torch
from diffusers import DiffusionPipeline

from dacc.benchmarks.full_size import example_inputs, make_denoiser, make_pipeline_folder
from dacc.benchmarks.full_size_models import MODELS
from dacc.evaluate.inspection import inspect_pipeline

PUBLISHED_PARAMETERS = {
    "dit-xl": 749.8e6,  # 675 M in the paper; diffusers gives each of the 28 blocks embedders of its own
    "sd15": 859.5e6,
    "sdxl": 2.567e9,
    "pixart-xl": 610e6,
    "sd35-medium": 2.243e9,  # 2.5 B as advertised counts the position table, which is a buffer
    "flux": 11.9e9,
    "wan-1.3b": 1.42e9,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_pipeline_folder("dit-xl", tmp_path_factory.mktemp("full-size") / "dit-xl", depth=1)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = MODELS[name].build(MODELS[name].published_depth)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == pytest.approx(PUBLISHED_PARAMETERS[name], rel=0.01)


@pytest.mark.parametrize(("name", "resolution"), [(name, size) for name in MODELS for size in MODELS[name].resolutions])
def test_example_inputs_fit_the_model(name, resolution):
    with torch.device("meta"):
        model = MODELS[name].build(depth=1).bfloat16()
    inputs = example_inputs(name, batch_size=2, resolution=resolution, device="meta")
    sample, prediction = next(iter(inputs.values())), model(**inputs).sample
    assert (len(prediction), *prediction.shape[2:]) == (2, *sample.shape[2:])


def test_the_same_seed_gives_the_same_weights():
    first, second, other = (make_denoiser("dit-xl", depth=1, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["proj_out_2.weight"], other["proj_out_2.weight"])


def test_a_prediction_is_of_order_one():
    prediction = make_denoiser("dit-xl", depth=1)(**example_inputs("dit-xl")).sample
    assert 0.3 < prediction.float().std() < 3


@pytest.mark.parametrize("name", ["dit-xl", "pixart-xl"])
def test_plain_diffusers_loads_what_was_made(name, folder, tmp_path):
    path = folder if name == "dit-xl" else make_pipeline_folder(name, tmp_path / name, depth=1)
    loaded = DiffusionPipeline.from_pretrained(path, dtype=torch.bfloat16).transformer
    made = make_denoiser(name, depth=1)
    for kind in ("named_parameters", "named_buffers"):  # position tables too, which are in no file
        expected = dict(getattr(made, kind)())
        assert {key: value.dtype for key, value in getattr(loaded, kind)()} == {k: v.dtype for k, v in expected.items()}
        assert all(torch.equal(value, expected[key]) for key, value in getattr(loaded, kind)())


def test_dacc_inspects_a_folder(folder):
    denoiser = inspect_pipeline(folder).components["transformer"]
    assert denoiser.macs_per_call
    assert denoiser.quantizable["linear"].parameters > 20e6
