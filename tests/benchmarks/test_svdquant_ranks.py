"""The table of what a branch is worth is measured on inputs that were not looked at, and counts the branch."""

import sys

import pytest
import torch

from dacc.benchmarks import svdquant_ranks
from dacc.benchmarks.study import RESULTS
from dacc.benchmarks.svdquant_ranks import ROUNDED, SETTINGS, bits_of, output_error, planted, quantized


@pytest.fixture
def layer(monkeypatch):
    monkeypatch.setattr(svdquant_ranks, "SEEN", 256)
    monkeypatch.setattr(svdquant_ranks, "JUDGED", 256)
    return planted(128, 192)


def test_planted_channels_are_outliers(layer):
    _, x = layer
    assert int((x.abs().amax(0) > 10 * x.abs().amax(0).median()).sum()) == svdquant_ranks.OUTLIERS


def test_outputs_get_nearer_with_factors_and_branch(layer):
    weight, x = layer
    rows = (ROUNDED, "rank 0, nearest", "rank 16, nearest")
    found = [quantized(row, weight, x[:256], SETTINGS["W4A4"]) for row in rows]
    errors = [output_error(weight, one, x[256:]) for one in found]
    assert errors == sorted(errors, reverse=True)
    slowly = x[256:] @ (found[0].dequantize() - weight).T  # the inputs are rounded besides
    assert errors[0] > float(slowly.norm() / (x[256:] @ weight.T).norm())


def test_bits_count_the_branch(layer):
    weight, x = layer
    alone, beside = (
        bits_of(quantized(row, weight, x[:256], SETTINGS["W8A8"])) for row in ("rank 0, nearest", "rank 16, nearest")
    )
    assert beside - alone == pytest.approx(16 * 16 * (192 + 128) / (192 * 128))
    assert 8 < alone < 8.5


def test_the_table_is_written_into_its_place(layer, tmp_path, monkeypatch):
    results = tmp_path / "results.md"
    results.write_text("before\n<!-- svdquant:ranks -->\nold\n<!-- /svdquant:ranks -->\nafter\n")
    monkeypatch.setattr(svdquant_ranks, "ROWS", {"rank 16": {"rank": 16}})
    words = ["--shape", "64x32", "--setting", "W4A8", "--threads", str(torch.get_num_threads())]
    monkeypatch.setattr(sys, "argv", ["svdquant_ranks.py", *words, "--results", str(results)])
    svdquant_ranks.main()
    text = results.read_text()
    assert "old" not in text
    assert text.count("\n| ") == 3
    assert "| row | 64x32, W4A8 | bits |" in text
    assert "<!-- svdquant:ranks -->" in RESULTS.read_text()
