"""A search whose runs are like those of a calibration set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dacc import CalibrateConfig, SearchCacheConfig, calibrate_pipeline, search_cache
from dacc.cache.files import like_calibration
from dacc.core.calibration import read_calibration
from dacc.core.errors import BundleError, ModelError
from dacc.core.manifest import read_manifest
from dacc.core.reporter import Reporter

RUNS: dict[str, Any] = {
    "steps": 5,
    "guidance_scale": 3.0,
    "prompts": ("a red dot", "a blue line"),
    "negative_prompt": ("a face", "a tree"),
    "height": 32,
    "width": 32,
}
QUICK: dict[str, Any] = {"macs_ratio": 0.7, "method": "dp", "samples": 2, "measure": "never"}
PLAIN = {"settings": {"rank": 0, "trials": 0}}


@pytest.fixture(scope="session")
def calibration(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of the Stable Diffusion pipeline; not to be changed."""
    config = CalibrateConfig(samples=2, batch_size=2, timesteps=2, **RUNS)
    return calibrate_pipeline(sd_folder, config, output=tmp_path_factory.mktemp("sets") / "set", device="cpu")


def search(source: Path, output: str, *, calib: Path | None = None, **fields: Any) -> Path:
    config = SearchCacheConfig(**{**QUICK, **PLAIN, **fields})
    return search_cache(source, config, calib=calib, output=output, device="cpu")


def test_what_is_left_open_is_as_in_the_runs_of_the_set(sd_folder, calibration):
    bundle = search(sd_folder, "out", calib=calibration)
    made = read_manifest(bundle).passes[-1]
    record = read_calibration(calibration)
    assert made.calibration == record.id
    assert {name: made.config[name] for name in RUNS} == json.loads(json.dumps(RUNS))
    by_hand = search(sd_folder, "by-hand", **RUNS)
    plans = [read_manifest(found).components["unet"].cache for found in (bundle, by_hand)]
    assert plans[0] == plans[1]
    assert read_manifest(by_hand).passes[-1].calibration is None
    assert search(sd_folder, "out", calib=calibration) == bundle  # there already


def test_prompts_are_dealt_as_to_the_samples_of_the_set(sd_folder, tmp_path):
    runs = {"steps": 2, "height": 32, "width": 32}
    three = CalibrateConfig(samples=5, timesteps=2, prompts=("a", "b", "a"), **runs)
    calibrated = calibrate_pipeline(sd_folder, three, output=tmp_path / "set", device="cpu")
    config = like_calibration(SearchCacheConfig(), read_calibration(calibrated), Reporter(quiet=True))
    assert config.prompts == ("a", "b", "a")  # a, b, a, a, b
    assert (config.steps, config.height, config.class_labels, config.negative_prompt) == (2, 32, None, None)


def test_what_is_given_is_not_taken_from_the_set(sd_folder, calibration):
    bundle = search(sd_folder, "out", calib=calibration, steps=4, prompts=("a circle",))
    config = read_manifest(bundle).passes[-1].config
    assert (config["steps"], config["prompts"], config["guidance_scale"]) == (4, ["a circle"], 3.0)


def test_a_set_as_the_source_is_its_pipeline_and_its_runs(sd_folder, calibration):
    made = read_manifest(search(calibration, "out")).passes[-1]
    assert made.calibration == read_calibration(calibration).id
    assert made.config["steps"] == 5


def test_a_set_of_another_model_and_a_damaged_one_are_refused(unet_folder, sd_folder, calibration, tmp_path):
    with pytest.raises(ModelError, match="other weights"):
        search(unet_folder, "out", calib=calibration)
    with pytest.raises(ModelError, match="is not a calibration set"):
        search(sd_folder, "out", calib=sd_folder)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in calibration.iterdir():
        content = file.read_bytes()
        (damaged / file.name).write_bytes(content[:-9] if file.suffix == ".safetensors" else content)
    with pytest.raises(BundleError):
        search(sd_folder, "out", calib=damaged)
    assert not Path("out").exists()


def test_pictures_that_the_runs_of_a_set_began_with_are_told(sd_folder, calibration, monkeypatch):
    record = read_calibration(calibration)
    pictured = record.model_copy(update={"recipe": {**record.recipe, "images": "photos"}})
    monkeypatch.setattr("dacc.cache.api.calibration_record", lambda folder: pictured)
    reporter = Reporter(quiet=True)
    config = SearchCacheConfig(**{**QUICK, **PLAIN})
    search_cache(sd_folder, config, calib=calibration, output="out", device="cpu", reporter=reporter)
    assert any("began with pictures" in notice for notice in reporter.notices)
