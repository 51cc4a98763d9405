"""The study of pruning measures cells for real, goes on where it stopped, makes its tables from the JSON alone."""

import argparse

import pytest

from dacc.benchmarks import prune_study
from dacc.benchmarks.prune_rows import CUTS, PIPELINES, ROWS, WHOLE, PruneCell, PruneStudy
from dacc.benchmarks.prune_table import prune_block, write_prune_tables
from dacc.benchmarks.ptq_bench import Bench
from dacc.benchmarks.study import RESULTS, read_study
from dacc.core.config import build_config
from dacc.core.reporter import silent
from dacc.evaluate.result import Metric
from dacc.prune.config import PruneConfig


@pytest.fixture
def bench(tmp_path):
    options = argparse.Namespace(
        seeds=2, fid_samples=0, steps=6, batch_size=2, threads=1, again=False, only_missing=False,
        work=tmp_path / "work", json=tmp_path / "study.json", results=tmp_path / "results.md",
    )  # fmt: skip
    return Bench("digits-dit", options, silent())


def test_cells_are_measured_and_not_measured_twice(bench, monkeypatch):
    places = [("-", WHOLE), ("15 %", "bksdm"), ("30 %", "random")]
    for place in places:
        prune_study.fill(bench, *place)
    study = read_study(bench.options.json, PruneStudy)
    found = {cell.row: cell for cell in study.cells}
    assert [cell.status for cell in found.values()] == ["measured"] * 3
    less, more = found["bksdm"], found["random"]
    assert more.parameter_share <= 0.7 < less.parameter_share <= 0.86
    assert more.macs_share < less.macs_share < 1
    assert len(more.removed) > len(less.removed) > 0
    assert less.speedup > 1
    assert less.metrics["relative_l2"].value > 0
    assert "relative_l2" not in found[WHOLE].metrics
    monkeypatch.setattr(prune_study, "treat", lambda *_: pytest.fail("measured again"))
    for place in places:
        prune_study.fill(bench, *place)


def test_a_cut_that_cannot_be_made_is_on_record(bench, monkeypatch):
    monkeypatch.setitem(CUTS, "15 %", {"ratio": 0.95})
    prune_study.fill(bench, "15 %", "bksdm")
    (cell,) = read_study(bench.options.json, PruneStudy).cells
    assert cell.status.startswith("failed: ")
    assert "--ratio" in cell.status


def test_every_cell_is_a_request_that_dacc_prune_takes():
    options = argparse.Namespace(row=None, cut=None)
    for pipeline in PIPELINES:
        places = list(prune_study.wanted_cells(pipeline, options))
        assert places[0] == ("-", WHOLE)
        assert len(set(places)) == len(places) == 1 + len(CUTS) * len(ROWS)
        for cut, row in places[1:]:
            config = build_config(PruneConfig, **prune_study.cell_options(cut, row)).resolved()
            config.of_method()
            assert config.of_recovery().steps == CUTS[cut].get("recover", 0)


def test_tables_hold_shares_and_what_training_gained(tmp_path):
    error = Metric(value=0.1, low=0.05, high=0.2, count=4, better="lower")
    facts = {"pipeline": "digits-dit", "fingerprint": "a", "metrics": {"relative_l2": error}, "parameter_share": 0.71}
    trained = PruneCell(cut="30 %, trained", row="score", error_before=0.07, error_after=0.02, **facts)
    failed = PruneCell(pipeline="digits-dit", cut="30 %", row="bksdm", fingerprint="a", status="failed: a | b")
    study = PruneStudy(cells=(trained, failed))
    rows = prune_block(study.cells, "").splitlines()[2:]
    assert "| 30 %, trained | score | 0.710 | - | - | 0.1 [0.05, 0.2] |" in rows[3]
    assert "0.07 -> 0.02" in rows[3]
    assert "failed: a / b" in rows[2]
    assert len({row.count("|") for row in rows}) == 1
    file = tmp_path / "results.md"
    file.write_text("<!-- prune:digits-dit -->\nold\n<!-- /prune:digits-dit -->\n")
    assert write_prune_tables(file, study, PIPELINES, {}) == ["digits-dit"]
    assert "old" not in file.read_text()


def test_the_results_have_a_place_for_every_pipeline():
    text = RESULTS.read_text(encoding="utf-8")
    for name in PIPELINES:
        assert f"<!-- prune:{name} -->" in text
        assert f"<!-- /prune:{name} -->" in text
