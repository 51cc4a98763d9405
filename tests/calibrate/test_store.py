"""What a set must be to be read."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dacc import open_calibration
from dacc.calibrate.store import _Shard
from dacc.core.calibration import read_calibration
from dacc.core.errors import BundleError, CalibrationError, ConfigError, ModelError
from dacc.core.reporter import silent

SHARD = "calls-00001.safetensors"


@pytest.fixture
def folder(made_set: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(made_set, tmp_path / "copy"))


def rewrite(folder: Path, **changes: Any) -> None:
    """Change the record and make its id fit again, as somebody would who wants to deceive."""
    record = read_calibration(folder).model_copy(update=changes)
    (folder / "dacc_calibration.json").write_text(record.model_copy(update={"id": record.identity()}).to_json())


def test_a_set_is_read_in_the_order_of_the_run(made_set: Path) -> None:
    found = open_calibration(made_set)
    assert len(found) == 6
    states = [call.state for call in found]
    assert [(state.run, state.call) for state in states] == [(-1, 0), (-1, 2), (-1, 4), (-2, 0), (-2, 2), (-2, 4)]
    assert [state.timestep for state in states[:3]] == [found.schedule.timesteps[call] for call in (0, 2, 4)]
    assert [tuple(call.args[0].shape) for call in found.batch(1)] == [(1, 1, 16, 16)] * 3
    assert len(open_calibration(made_set, component="unet")) == 6


def test_a_network_of_another_type_gets_large_floats_in_its_own(made_set: Path) -> None:
    entered = list(open_calibration(made_set))
    found = list(open_calibration(made_set).of("unet", dtype=torch.bfloat16))
    assert {call.args[0].dtype for call in found} == {torch.bfloat16}
    for call, whole in zip(found, entered, strict=True):
        assert torch.equal(call.args[0], whole.args[0].bfloat16())
        assert torch.equal(call.args[1], whole.args[1])  # the timestep, exactly
        assert call.args[1].dtype == whole.args[1].dtype


def test_the_largest_call_is_of_the_batch_with_the_most_samples(folder: Path) -> None:
    shards = read_calibration(folder).shards
    assert len(shards[0].samples) > len(shards[1].samples)
    for order in (shards, shards[::-1]):
        rewrite(folder, shards=order)
        found = open_calibration(folder)
        assert len(found.largest.args[0]) == max(len(call.args[0]) for call in found) > 1


def test_the_moments_of_all_calls_are_known_without_their_tensors(made_set: Path, monkeypatch) -> None:
    monkeypatch.delattr(_Shard, "_load")
    assert open_calibration(made_set).moments == [0, 2, 4, 0, 2, 4]


def test_the_files_can_be_read_without_dacc(made_set: Path) -> None:
    record = json.loads((made_set / "dacc_calibration.json").read_text())
    shard = record["shards"][0]
    with safe_open(made_set / shard["file"], framework="pt") as file:
        entries = json.loads(file.metadata()["record"])["records"]
        sample = file.get_tensor(entries[0]["args"][0]["tensor"])
        timestep = file.get_tensor(entries[0]["args"][1]["tensor"])
    first = next(iter(open_calibration(made_set)))
    assert torch.equal(sample, first.args[0])
    assert timestep == record["schedule"]["timesteps"][0]
    assert hashlib.sha256((made_set / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]


def test_a_damaged_file_is_named(folder: Path) -> None:
    raw = bytearray((folder / SHARD).read_bytes())
    raw[-5] ^= 1
    (folder / SHARD).write_bytes(raw)
    with pytest.raises(BundleError, match=f"{SHARD} is damaged"):
        open_calibration(folder)
    (folder / SHARD).write_bytes(raw[:-4])
    with pytest.raises(BundleError, match=f"{SHARD} has .* bytes"):
        open_calibration(folder)
    (folder / SHARD).unlink()
    with pytest.raises(BundleError, match=f"{SHARD} is missing"):
        open_calibration(folder)


def test_a_record_that_was_changed_is_refused(folder: Path) -> None:
    file = folder / "dacc_calibration.json"
    text = file.read_text()
    file.write_text(text.replace('"steps": 6', '"steps": 7'))
    with pytest.raises(BundleError, match="is not what it was"):
        open_calibration(folder)
    file.write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(BundleError, match="Upgrade"):
        open_calibration(folder)
    file.write_text(text[:100])
    with pytest.raises(BundleError, match="not readable JSON"):
        open_calibration(folder)
    file.unlink()
    with pytest.raises(ModelError, match="is not a calibration set"):
        open_calibration(folder)


def test_a_file_outside_is_not_read(folder: Path) -> None:
    shards = read_calibration(folder).shards
    rewrite(folder, shards=(shards[0].model_copy(update={"file": "../calls-00000.safetensors"}), *shards[1:]))
    with pytest.raises(BundleError, match="leads out of it"):
        open_calibration(folder)


def test_nan_is_refused_when_it_is_reached(folder: Path) -> None:
    with safe_open(folder / SHARD, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / SHARD)
    save_file({name: value * float("nan") for name, value in tensors.items()}, folder / SHARD, metadata=metadata)
    raw, shards = (folder / SHARD).read_bytes(), read_calibration(folder).shards
    changed = shards[1].model_copy(update={"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()})
    rewrite(folder, shards=(shards[0], changed))
    found = open_calibration(folder)
    assert len(list(found.batch(0))) == 3
    with pytest.raises(CalibrationError, match=f"{SHARD} holds NaN"):
        list(found)


def test_a_record_that_makes_no_sense_is_damage(folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, folder / SHARD, metadata={"record": '{"records": [{"component": "unet"}]}'})
    raw, shards = (folder / SHARD).read_bytes(), read_calibration(folder).shards
    changed = shards[1].model_copy(update={"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()})
    rewrite(folder, shards=(shards[0], changed))
    with pytest.raises(BundleError, match="cannot be read"):
        list(open_calibration(folder))


def test_a_set_of_another_model_is_refused_and_one_of_an_ancestor_noticed(made_set: Path) -> None:
    own = read_calibration(made_set).source.weights["unet"]
    assert len(open_calibration(made_set, weights={"unet": own})) == 6
    with pytest.raises(ModelError, match="unet has other weights"):
        open_calibration(made_set, weights={"unet": "0" * 64})
    reporter = silent()
    open_calibration(made_set, weights={"unet": "0" * 64}, ancestors={"unet": [own]}, reporter=reporter)
    assert "earlier passes changed unet" in reporter.notices[0]
    with pytest.raises(ConfigError, match="Known: unet"):
        open_calibration(made_set, component="transformer")


def test_a_call_is_taken_by_its_place_without_reading_the_others(made_set: Path, monkeypatch) -> None:
    whole, loaded, load = list(open_calibration(made_set)), list[str](), _Shard._load

    def watched(shard: _Shard, read: Any, name: str, entered_as: Any) -> torch.Tensor:
        loaded.append(name)
        return load(shard, read, name, entered_as)

    monkeypatch.setattr(_Shard, "_load", watched)
    found = open_calibration(made_set)
    one, same = found[4], whole[4]
    assert (one.state, list(one.kwargs)) == (same.state, list(same.kwargs))
    assert torch.equal(one.args[0], same.args[0])
    assert len(loaded) == sum(isinstance(value, torch.Tensor) for value in (*same.args, *same.kwargs.values()))
    assert [call.state for call in found[1:5]] == [call.state for call in whole[1:5]]
    assert found[-1].state == whole[-1].state
    with pytest.raises(IndexError):
        found[6]
