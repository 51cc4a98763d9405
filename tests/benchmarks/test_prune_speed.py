"""The table of times of pruned networks, on a tiny one."""

import shutil

import pytest
import torch

from dacc.benchmarks import prune_speed


def test_rows_hold_what_was_promised_and_what_was_reached(dit_folder, tmp_path, monkeypatch):
    def make(model, folder, **_):
        return shutil.copytree(dit_folder, folder)

    inputs = {
        "hidden_states": torch.zeros(1, 4, 8, 8),
        "timestep": torch.tensor([5]),
        "class_labels": torch.tensor([0]),
    }
    monkeypatch.setattr(prune_speed, "make_pipeline_folder", make)
    monkeypatch.setattr(prune_speed, "example_inputs", lambda *_, **__: inputs)
    monkeypatch.setattr(prune_speed, "measure_in_turns", lambda calls, _: [[8.0, 6.0, 7.0], [3.5], [3.5]])
    monkeypatch.setitem(prune_speed.CUTS, "dit-xl", {"some": {"ratio": 0.2}, "as much": {"ratio": 0.2}})
    whole, some, same = prune_speed.rows_of("dit-xl", tmp_path, torch.float32, 3)
    cells = [[cell.strip() for cell in row.split("|")] for row in (whole, some, same)]
    assert [row[2] for row in cells] == ["whole", "some", "as much"]
    assert [float(row[7]) for row in cells] == [1, 2, 2]
    promised = float(cells[1][6])
    assert 1 < promised < 2.5
    assert float(cells[1][8]) == pytest.approx(2 / promised, abs=0.01)
