"""The table of times of cached runs, on a tiny network."""

import shutil

import diffusers
import pytest
import torch

from dacc.benchmarks import cache_speed


def test_rows_hold_what_was_promised_and_what_was_reached(dit_folder, tmp_path, monkeypatch):
    def make(model, folder, **_):
        return shutil.copytree(dit_folder, folder)

    times = iter([9.0, 1.0, 8.0, 4.0, 3.0, 6.0] * 2)  # the first runs warm up; then plan and none take turns
    monkeypatch.setattr(cache_speed, "make_pipeline_folder", make)
    monkeypatch.setattr(cache_speed, "loop_seconds", lambda *_: next(times))
    monkeypatch.setattr(cache_speed, "SHARES", (2,))
    rows = cache_speed.rows_of("dit-xl", tmp_path / "made", torch.float32, 2)
    cells = [[cell.strip() for cell in row.split("|")] for row in rows]
    assert [row[2:4] for row in cells] == [["deepcache", "6 of 12"], ["taylor", "6 of 12"]]
    for row in cells:
        promised, reached, share = map(float, row[5:8])
        assert 1 < promised < 2.2
        assert reached == 2
        assert share == pytest.approx(2 / promised, abs=0.01)


def test_bits_are_compared_for_several_units(dit_folder, monkeypatch):
    model = diffusers.DiTTransformer2DModel.from_pretrained(dit_folder / "transformer")
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([5]),
        "class_labels": torch.tensor([0]),
    }
    monkeypatch.setattr(cache_speed, "make_denoiser", lambda *_, **__: model)
    monkeypatch.setattr(cache_speed, "example_inputs", lambda *_, **__: inputs)
    row = cache_speed.exact_row("dit-xl")
    assert (row.count("block_range"), row.count("output"), row.count("same bits")) == (2, 1, 3)
    outputs = iter([0.0, 1.0, 0.0, 0.0])
    monkeypatch.setattr(cache_speed, "make_denoiser", lambda *_, **__: model)
    monkeypatch.setattr(model, "forward", lambda **_: (torch.tensor(next(outputs)),))
    row = cache_speed.exact_row("dit-xl")
    assert "OTHER bits" in row
    assert "same bits" in row
