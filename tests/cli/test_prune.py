"""`dacc prune` at the shell."""

from __future__ import annotations

import json

from ..prune.conftest import deep_dit  # noqa: F401


def test_it_prints_the_path_or_a_record(dacc, deep_dit, tmp_path):  # noqa: F811
    words = ("prune", deep_dit, "--ratio", 0.3, "--method", "bksdm", "--measure", "never", "-o", tmp_path / "out")
    ran = dacc(*words)
    assert (ran.code, ran.out) == (0, f"{tmp_path / 'out'}\n"), ran.err
    ran = dacc(*words, "--json")
    record = json.loads(ran.out)
    assert list(record)[:3] == ["schema", "path", "manifest"]
    own = record["components"]["transformer"]
    assert own["parameters_after"] < own["parameters_before"]
    assert len(own["removed"]) == 2


def test_a_dry_run_shows_scores_and_writes_a_picture_alone(dacc, deep_dit, tmp_path):  # noqa: F811
    quick = ("--set", "samples=1", "--set", "timesteps=2", "--set", "score=bi")
    ran = dacc("prune", deep_dit, "--ratio", 0.3, "--dry-run", *quick, "--plot", tmp_path / "plot.png")
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert "num_layers 4" in lines[0]
    assert sum(line.split()[0] == "goes" for line in lines[2:]) == 2
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "plot.png"]


def test_wrong_words_are_answered_with_advice(dacc, deep_dit, tmp_path):  # noqa: F811
    assert dacc("prune", deep_dit, "--ratio", 1.5).code == 2
    ran = dacc("prune", deep_dit, "--ratio", 0.9, "--method", "bksdm", "-o", tmp_path / "out")
    assert ran.code == 7
    assert "or less" in ran.err
    ran = dacc("prune", deep_dit, "--plot", tmp_path / "plot.png")
    assert (ran.code, "--dry-run" in ran.err) == (2, True)
    ran = dacc("prune", deep_dit, "--set", "trainable=lora")
    assert (ran.code, "--recover" in ran.err) == (2, True)
