"""The study of pruning measures cells for real, goes on where it stopped, makes its tables from the JSON alone."""

import argparse

import pytest

from dacc.benchmarks import prune_rows, prune_study
from dacc.benchmarks.prune_rows import (
    CUTS,
    IMAGE_CUTS,
    PIPELINES,
    ROWS,
    VIDEOS,
    WHOLE,
    PruneCell,
    PruneStudy,
    cell_options,
    cuts_of,
)
from dacc.benchmarks.prune_table import prune_block, write_prune_tables
from dacc.benchmarks.ptq_bench import Bench
from dacc.benchmarks.study import RESULTS, read_study
from dacc.core.config import build_config
from dacc.core.reporter import silent
from dacc.evaluate.result import Metric
from dacc.prune import config
from dacc.prune.config import PruneConfig


@pytest.fixture
def options(tmp_path):
    return argparse.Namespace(
        seeds=2, clips=2, recover=None, fid_samples=0, steps=6, batch_size=2, threads=1, again=False,
        only_missing=False, work=tmp_path / "work", json=tmp_path / "study.json", results=tmp_path / "results.md",
    )  # fmt: skip


@pytest.fixture
def bench(options):
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
    assert less.speedup > 0
    assert less.metrics["relative_l2"].value > 0
    assert "relative_l2" not in found[WHOLE].metrics
    monkeypatch.setattr(prune_study, "treat", lambda *_: pytest.fail("measured again"))
    for place in places:
        prune_study.fill(bench, *place)


def test_a_cut_that_cannot_be_made_is_on_record(bench, monkeypatch):
    monkeypatch.setitem(IMAGE_CUTS, "15 %", {"ratio": 0.95})
    prune_study.fill(bench, "15 %", "bksdm")
    (cell,) = read_study(bench.options.json, PruneStudy).cells
    assert cell.status.startswith("failed: ")
    assert "--ratio" in cell.status


def test_every_cell_is_a_request_that_dacc_prune_takes():
    options = argparse.Namespace(row=None, cut=None)
    for pipeline in PIPELINES:
        places = list(prune_study.wanted_cells(pipeline, options))
        assert places[0] == ("-", WHOLE)
        own = [name for name, row in ROWS.items() if pipeline in row.pipelines]
        assert len(set(places)) == len(places) == 1 + len(cuts_of(pipeline)) * len(own) > 1
        for cut, row in places[1:]:
            request = build_config(PruneConfig, **cell_options(pipeline, cut, row)).resolved()
            request.of_method()
            assert request.of_recovery().steps == CUTS[cut].get("recover", 0)


def test_rows_of_a_trained_video_cut_differ_in_what_goes_alone():
    for cut in cuts_of("digits-video"):
        ours, control = (cell_options("digits-video", cut, row) for row in ("vdmini", "vdmini (deep)"))
        assert control.pop("settings") == {**ours.pop("settings"), "deep": True}
        assert ours == control
        shorter = cell_options("digits-video", cut, "vdmini", recover=3)
        assert shorter.get("recover", 0) == (3 if "trained" in cut else 0)


@pytest.mark.slow
def test_clips_are_judged_and_trained_cells_know_how_long(options, monkeypatch):
    monkeypatch.setitem(prune_rows.VIDEO_TRAINING, "samples", 2)
    monkeypatch.setattr(config, "RECOVERY_SAMPLES", 2)
    monkeypatch.setattr(config, "RECOVERY_TIMESTEPS", 2)
    options = argparse.Namespace(**vars(options) | {"seeds": 99, "steps": 2, "recover": 2})
    (name,) = VIDEOS
    bench = Bench(name, prune_study.options_for(name, options), silent())
    places = [("-", WHOLE), ("40 %, trained", "vdmini (deep)")]
    for place in places:
        prune_study.fill(bench, *place)
    study = read_study(bench.options.json, PruneStudy)
    whole, trained = (study.find(name, *place) for place in places)
    assert [cell.status for cell in (whole, trained)] == ["measured"] * 2
    judged = {"digit_accuracy", "motion_accuracy", "caption_accuracy", "frechet_video"}
    assert judged <= whole.metrics.keys()
    assert judged | {"frechet_video_ratio", "relative_l2", "psnr"} <= trained.metrics.keys()
    assert trained.parameter_share == pytest.approx(0.583, abs=1e-3)
    assert trained.weight_bytes < 0.7 * whole.weight_bytes
    assert (whole.updates, trained.updates) == (None, 2)
    assert trained.training_seconds > 0
    assert trained.error_before >= trained.error_after
    assert {cell.seeds for cell in study.cells} == {2}


def test_tables_of_clips_have_their_own_columns():
    share = Metric(value=0.875, low=0.8, high=0.92, count=40, better="higher")
    metrics = {"digit_accuracy": share, "motion_accuracy": share, "frechet_video": share, "frechet_video_ratio": share}
    facts = {"pipeline": "digits-video", "fingerprint": "a", "seeds": 40, "steps": 20}
    trained = PruneCell(
        cut="40 %, trained", row="vdmini", metrics=metrics, error_before=0.6, error_after=0.1, updates=3000,
        training_seconds=3600, weight_bytes=3_300_000, **facts,
    )  # fmt: skip
    failed = PruneCell(cut="40 %", row="vdmini (deep)", status="failed: a | b", **facts)
    heading, _, *rows = prune_block([trained, failed], "").splitlines()
    assert heading.startswith("40 clips against")
    assert len({row.count("|") for row in rows}) == 1
    assert "digit_accuracy | motion_accuracy | Frechet video distance | Frechet video distance / float" in rows[0]
    assert "| 3.3 MB |" in rows[3]
    assert "| 0.6 -> 0.1 | 3,000 | 60 min | - |" in rows[3]


def test_tables_hold_shares_and_what_training_gained(tmp_path):
    error = Metric(value=0.1, low=0.05, high=0.2, count=4, better="lower")
    facts = {"pipeline": "digits-dit", "fingerprint": "a", "metrics": {"relative_l2": error}, "parameter_share": 0.71}
    trained = PruneCell(cut="30 %, trained", row="score", error_before=0.07, error_after=0.02, **facts)
    failed = PruneCell(pipeline="digits-dit", cut="30 %", row="bksdm", fingerprint="a", status="failed: a | b")
    study = PruneStudy(cells=(trained, failed))
    rows = prune_block(study.cells, "").splitlines()[2:]
    assert "| 30 %, trained | score | 0.710 | - | - | - | 0.1 [0.05, 0.2] |" in rows[3]
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
