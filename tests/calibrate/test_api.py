"""The folder as a whole: equal bytes, interruptions, what exists already, and what a set means as a SOURCE."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dacc import CalibrateConfig, calibrate_pipeline, open_calibration
from dacc.calibrate import collect
from dacc.core.errors import BundleError, ConfigError, ModelError, UnsupportedError
from dacc.core.reporter import silent
from dacc.core.source import resolve_source


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != "dacc_run.json"}


def interrupt_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """Ctrl-C in the middle of the next batch."""
    record_batch, seen = collect.record_batch, []

    def interrupted(pipe: Any, *arguments: Any) -> None:
        seen.append(0)
        if len(seen) > batches:
            raise KeyboardInterrupt
        record_batch(pipe, *arguments)

    monkeypatch.setattr(collect, "record_batch", interrupted)


def test_equal_seeds_give_equal_bytes_and_another_seed_another_id(unet_folder, calibrated) -> None:
    first, second, other = (
        calibrated(unet_folder, _output=name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert content(first) == content(second)
    records = [open_calibration(folder).record for folder in (first, second, other)]
    assert records[0].id == records[1].id != records[2].id
    assert records[0].shards[0].sha256 != records[2].shards[0].sha256


def test_nothing_in_the_hashed_files_tells_where_they_were_made(unet_folder, calibrated, tmp_path) -> None:
    elsewhere = Path(shutil.copytree(unet_folder, tmp_path / "away" / unet_folder.name))
    first, second = calibrated(unet_folder, _output="a"), calibrated(elsewhere, _output="b")
    assert content(first) == content(second)
    assert str(unet_folder).encode() not in b"".join(content(first).values())
    assert json.loads((first / "dacc_run.json").read_text())["source_path"] == str(unet_folder)


@pytest.mark.parametrize(
    "options", [{}, {"strategy": "ndtc", "timesteps": None, "samples": 8}, {"samples": 16, "budget_gb": 4e-5}]
)
def test_an_interrupted_run_ends_with_the_bytes_of_an_uninterrupted_one(
    options: dict[str, Any], unet_folder, calibrated, monkeypatch, tmp_path
) -> None:
    options = {"samples": 7, **options}
    expected = content(calibrated(unet_folder, _output="whole", **options))
    assert 3 <= len(expected) - 1 < 8
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            calibrated(unet_folder, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".set.partial", "whole"]
    reporter = silent()
    said: list[str] = []
    monkeypatch.setattr(reporter, "say", said.append)
    assert content(calibrated(unet_folder, _reporter=reporter, **options)) == expected
    assert "going on with 2 finished units of the interrupted run" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "whole"]


def test_without_resume_and_with_other_options_it_begins_anew(unet_folder, calibrated, monkeypatch, watch) -> None:
    expected = content(calibrated(unet_folder, _output="whole"))
    for output, change, options in (("a", {}, {"_resume": False}), ("b", {"seed": 1}, {})):
        with monkeypatch.context() as patch:
            interrupt_after(patch, 1)
            with pytest.raises(KeyboardInterrupt):
                calibrated(unet_folder, _output=output, **change)
        found = content(calibrated(unet_folder, _output=output, **options))
        assert found == expected
        assert len(watch.seen) == 1 + 2 * 5  # one to look ahead, then both batches up to call 4


def test_a_set_that_exists_is_returned_and_another_is_refused(unet_folder, calibrated, watch) -> None:
    folder = calibrated(unet_folder)
    watch.pipe = None
    assert calibrated(unet_folder) == folder
    assert watch.pipe is None  # nothing was loaded
    with pytest.raises(ConfigError, match="--overwrite"):
        calibrated(unet_folder, seed=1)
    before = open_calibration(folder).record.id
    assert open_calibration(calibrated(unet_folder, seed=1, _overwrite=True)).record.id != before
    (folder / "calls-00000.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="--overwrite"):  # not intact, so it is not what was asked for
        calibrated(unet_folder, seed=1)


def test_a_set_whose_bytes_changed_is_not_what_was_asked_for(unet_folder, calibrated, watch) -> None:
    folder = calibrated(unet_folder)
    file = folder / "calls-00000.safetensors"
    before = file.read_bytes()
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(ConfigError, match=r"damaged: calls-00000.safetensors.*--overwrite"):
        calibrated(unet_folder)
    assert calibrated(unet_folder, _overwrite=True) == folder
    assert file.read_bytes() == before


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_dtype_is_another_set(dtype: str, unet_folder, calibrated) -> None:
    record = open_calibration(calibrated(unet_folder, timesteps=1, _dtype=dtype)).record
    assert record.recipe["dtype"] == dtype


def test_wrong_words_are_refused_before_anything_is_loaded(unet_folder, calibrated, watch) -> None:
    for fields, advice in (
        ({"strategy": "unifrom"}, "Did you mean uniform?"),
        ({"settings": {"form": "code"}}, "Fields: timesteps"),
        ({"strategy": "ndtc"}, "--timesteps does not go with --strategy ndtc"),
        ({"component": ("vae",)}, "Known: "),
        ({"component": ("scheduler",)}, "Choose from unet"),
    ):
        with pytest.raises(ConfigError, match=advice):
            calibrated(unet_folder, **fields)
    with pytest.raises(ModelError):
        calibrated("nowhere")
    assert watch.pipe is None


def test_an_argument_that_would_need_a_pickle_is_refused_by_name(unet_folder, calibrated, watch, tmp_path) -> None:
    def wrap(pipe: Any) -> None:
        forward = pipe.unet.forward
        pipe.unet.forward = lambda *args, helper=None, **kwargs: forward(*args, **kwargs)
        pipe.unet.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "helper": object()}), with_kwargs=True
        )

    watch.before = wrap
    with pytest.raises(UnsupportedError, match="argument 'helper' of call 0 of unet is a object"):
        calibrated(unet_folder)
    assert not list(tmp_path.iterdir())


def test_a_set_means_the_pipeline_that_it_was_made_from(unet_folder, calibrated, tmp_path) -> None:
    source = Path(shutil.copytree(unet_folder, tmp_path / "pipe"))
    folder = calibrated(source, timesteps=1)
    assert resolve_source(str(folder), reporter=silent()).path == source
    (folder / "dacc_run.json").unlink()
    assert resolve_source(str(folder), reporter=silent()).path == source  # a neighbour of that name
    away = source.rename(tmp_path / "away")
    with pytest.raises(ModelError, match="calibration set of pipe, which is not at"):
        resolve_source(str(folder), reporter=silent())
    shutil.copytree(away, source)
    weights = source / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelError, match="unet has other weights now"):
        resolve_source(str(folder), reporter=silent())


def test_a_set_whose_record_was_changed_means_no_pipeline(unet_folder, made_set, tmp_path) -> None:
    folder = Path(shutil.copytree(made_set, tmp_path / "changed"))
    facts = json.loads((folder / "dacc_calibration.json").read_text())
    facts["source"]["weights"] = {}
    (folder / "dacc_calibration.json").write_text(json.dumps(facts))
    with pytest.raises(BundleError, match="not what it was"):
        resolve_source(str(folder), reporter=silent())


def test_a_set_of_a_zoo_pipeline_leads_back_to_the_zoo(calibrated) -> None:
    folder = calibrated("zoo:digits-unet", timesteps=1, samples=1, steps=2)
    found = resolve_source(str(folder), reporter=silent())
    assert (found.identity, found.kind) == ("zoo:digits-unet", "zoo")


def test_a_quantized_source_is_a_notice(unet_folder, bundle_of, calibrated) -> None:
    reporter = silent()
    calibrated(bundle_of(unet_folder, bits=8), timesteps=1, _reporter=reporter)
    assert "is quantized" in reporter.notices[0]


def test_the_zoo_gives_steps_guidance_and_classes(tmp_path) -> None:
    config = CalibrateConfig(samples=12, batch_size=12, timesteps=1)
    record = open_calibration(calibrate_pipeline("zoo:digits-dit", config, output=tmp_path / "set")).record
    assert record.recipe["steps"] == len(record.schedule.timesteps) == 50
    assert record.recipe["guidance_scale"] == 1.5
    assert [sample.class_label for sample in record.samples] == [*range(10), 0, 1]
