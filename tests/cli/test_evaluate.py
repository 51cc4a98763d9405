"""`dacc evaluate` and its kin on requests and folders that cannot be served: one line of advice, no traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def dit(dit_folder: Path, tmp_path: Path) -> Path:
    """A copy of a tiny class-conditional pipeline, to be damaged."""
    return Path(shutil.copytree(dit_folder, tmp_path / "dit"))


def test_an_empty_reference_is_not_taken_for_none(dacc, pipeline):
    ran = dacc("evaluate", pipeline, "--reference", "")
    assert (ran.code, ran.out) == (2, "")
    assert "--reference is empty" in ran.error


@pytest.mark.parametrize("label", ["4242", "-1"])
@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_a_class_that_there_is_not(dacc, dit, command, label):
    ran = dacc(command, dit, "--class", label, "--num", "1", "--steps", "2")
    assert (ran.code, ran.out) == (2, "")
    assert f"class {label}: DiTPipeline has classes 0 to 999" in ran.error


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_more_steps_than_there_are(dacc, dit, command):
    ran = dacc(command, dit, "--num", "1", "--steps", "5000")
    assert (ran.code, ran.out) == (2, "")
    assert "Choose at most 1000 with --steps." in ran.error


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("transformer/config.json", {"num_layers": "x"}, "transformer/config.json"),
        ("transformer/config.json", [], "transformer/config.json"),
        ("model_index.json", {"_class_name": 3}, "model_index.json"),
        ("scheduler/scheduler_config.json", None, "scheduler/scheduler_config.json"),
    ],
    ids=["a value of the wrong type", "a list", "a class that is a number", "no scheduler config"],
)
@pytest.mark.parametrize("command", [["inspect"], ["quantize", "--measure", "never"]], ids=lambda words: words[0])
def test_a_broken_config_is_named(dacc, dit, command, file, content, named):
    if content is None:
        (dit / file).unlink()
    else:
        old = json.loads((dit / file).read_text())
        (dit / file).write_text(json.dumps({**old, **content} if isinstance(content, dict) else content))
    ran = dacc(*command, dit)
    assert (ran.code, ran.out) == (3, "")
    assert named in ran.error
