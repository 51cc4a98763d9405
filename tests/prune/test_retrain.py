"""`--recover` from request to bundle: what is trained is written, goes on after an interruption, is refused in time."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from PIL import Image

import dacc
from dacc import PruneConfig, prune_pipeline, verify_bundle
from dacc.core.errors import ConfigError, UnsupportedError
from dacc.core.manifest import read_manifest
from dacc.core.reporter import silent
from dacc.prune.api import calibration_config, prepare
from dacc.prune.config import METHODS
from dacc.prune.preview import preview_pruning
from dacc.prune.recovery import trainer
from dacc.prune.recovery.config import RecoveryConfig

TRAINED: dict[str, Any] = {"ratio": 0.3, "recover": 20, "settings": {"learning_rate": 2e-4, "patience": 0}}


@pytest.fixture
def files_of(inputs_of, deep_dit, tmp_path):
    """Makes a bundle and gives the bytes of all its files that are promised to be equal."""

    def make(name: str, fields: dict[str, Any] = TRAINED) -> dict[str, bytes]:
        config = PruneConfig(measure="never", **fields)
        bundle = prune_pipeline(deep_dit, config, calib=inputs_of(deep_dit), output=tmp_path / name, device="cpu")
        found = {str(file.relative_to(bundle)): file for file in bundle.rglob("*") if file.is_file()}
        return {name: file.read_bytes() for name, file in found.items() if name not in ("dacc_run.json", "README.md")}

    return make


def test_what_is_left_is_nearer_to_the_source_after_training(deep_dit, pruned):
    cut, trained = pruned(deep_dit, ratio=0.3), pruned(deep_dit, **TRAINED)
    assert verify_bundle(trained) == []
    record = read_manifest(trained).components["transformer"].pruning
    assert record.keep == read_manifest(cut).components["transformer"].pruning.keep
    assert (record.recovery.steps_done, record.recovery.trainable) == (20, "full")
    assert record.recovery.error_after < 0.9 * record.recovery.error_before
    seconds, none = (json.loads((folder / "dacc_run.json").read_text()) for folder in (trained, cut))
    assert seconds["recovery_cpu_seconds"]["transformer"] > 0
    assert none["recovery_cpu_seconds"] == {}
    before, after = (dacc.load(folder, device="cpu").transformer for folder in (cut, trained))
    assert before.config["num_layers"] == after.config["num_layers"] == 4
    name = "transformer_blocks.0.attn1.to_q.weight"
    assert not torch.equal(before.get_parameter(name), after.get_parameter(name))
    assert before.get_parameter(name).dtype == after.get_parameter(name).dtype


def test_a_set_of_pictures_is_learned_from_too(deep_dit, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(2):
        Image.new("RGB", (32, 32), (90 * number, 40, 200)).save(folder / f"{number}.png")
    asked = dacc.CalibrateConfig(images=folder, samples=2, steps=4, timesteps=4)
    shown = dacc.calibrate_pipeline(deep_dit, asked, output=tmp_path / "set", device="cpu")
    config = PruneConfig(measure="never", ratio=0.3, method="bksdm", recover=4)
    bundle = prune_pipeline(deep_dit, config, calib=shown, output=tmp_path / "pruned", device="cpu")
    losses = read_manifest(bundle).components["transformer"].pruning.recovery.losses
    assert set(losses) == {"output", "feature", "task"}
    assert 0 < losses["task"] < 10


def test_an_interrupted_recovery_goes_on_and_ends_with_the_same_bytes(files_of, tmp_path, monkeypatch):
    whole = files_of("whole")
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(trainer, "SAVE_SHARE", 0.0)
    update, seen = trainer._Run.update, []

    def interrupted(self: Any, training: Any) -> None:
        seen.append(training.done)
        if seen == [0, 1, 2, 3, 4, 5]:
            raise KeyboardInterrupt
        update(self, training)

    monkeypatch.setattr(trainer._Run, "update", interrupted)
    fields = {**TRAINED, "method": "bksdm"}  # nothing but the training is there to be gone on with
    with pytest.raises(KeyboardInterrupt):
        files_of("parts", fields)
    assert (tmp_path / ".parts.partial").is_dir()
    seen.append(-1)
    parts = files_of("parts", fields)
    assert seen[seen.index(-1) + 1] == 5
    assert parts == files_of("again", fields)
    assert parts.keys() == whole.keys()
    assert not (tmp_path / ".parts.partial").exists()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"settings": {"trainable": "lora"}}, "--recover STEPS"),
        ({"recover": 5, "settings": {"steps": 7}}, "--recover 7"),
        ({"recover": 5, "settings": {"trainable": "some"}}, "trainable"),
        ({"recover": 5, "settings": {"trainables": "full"}}, "trainables"),
    ],
)
def test_wrong_fields_of_recovery_are_refused_at_once(deep_dit, fields, told):
    with pytest.raises(ConfigError, match=told):
        prepare(deep_dit, PruneConfig(**fields), silent())


def test_a_class_without_gradient_checkpointing_is_refused_before_anything_runs(deep_dit, tmp_path, monkeypatch):
    fields = {**TRAINED, "settings": {"gradient_checkpointing": True}}
    monkeypatch.setattr(DiTTransformer2DModel, "_supports_gradient_checkpointing", False)
    monkeypatch.setattr("dacc.prune.run.calibration_for", lambda *_: pytest.fail("too late"))
    with pytest.raises(UnsupportedError, match="no gradient checkpointing for a DiTTransformer2DModel"):
        prune_pipeline(deep_dit, PruneConfig(**fields), output=tmp_path / "out", device="cpu")
    monkeypatch.setattr("dacc.prune.preview.calibration_for", lambda *_: pytest.fail("too late"))
    with pytest.raises(UnsupportedError, match="no gradient checkpointing for a DiTTransformer2DModel"):
        preview_pruning(deep_dit, PruneConfig(**fields), device="cpu", reporter=silent())
    assert list(tmp_path.iterdir()) == []


def test_fields_of_methods_and_of_recovery_have_different_names():
    for method in METHODS.names():
        assert not RecoveryConfig.model_fields.keys() & METHODS.load(method).CONFIG.model_fields.keys()


def test_a_set_that_is_trained_on_is_larger(deep_dit):
    sizes = [
        (made.samples, made.timesteps)
        for recover in (0, 5)
        for made in [calibration_config(prepare(deep_dit, PruneConfig(recover=recover), silent()))]
    ]
    assert sizes == [(16, 8), (64, 16)]


def test_a_set_for_training_has_as_many_pictures_to_a_call_as_asked_for(deep_dit):
    sizes = [
        calibration_config(prepare(deep_dit, PruneConfig(recover=5, settings=settings), silent())).batch_size
        for settings in ({}, {"batch_size": 2})
    ]
    assert sizes == [8, 2]
