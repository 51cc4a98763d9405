"""The study of cache plans measures cells for real, goes on where it stopped, makes its tables from the JSON alone."""

import argparse
from dataclasses import replace
from pathlib import Path

import pytest

from dacc.benchmarks import cache_bench, cache_study
from dacc.benchmarks.cache_cells import CacheCell, CacheStudy
from dacc.benchmarks.cache_peers import PEERS, CachePeer, fit_strength
from dacc.benchmarks.cache_rows import CACHE_PEERS, FEWER, PIPELINES, ROWS, SOURCES, TARGETS
from dacc.benchmarks.cache_table import cache_block, write_cache_tables
from dacc.benchmarks.ptq_bench import Bench
from dacc.benchmarks.study import RESULTS, read_study, record_cell
from dacc.cache.config import METHODS, SearchCacheConfig
from dacc.core.config import build_config
from dacc.core.errors import ConfigError, UnsupportedError
from dacc.core.reporter import silent
from dacc.evaluate.result import Metric


@pytest.fixture
def bench(tmp_path):
    options = argparse.Namespace(
        seeds=2, fid_samples=0, steps=6, batch_size=2, threads=1, again=False, only_missing=False,
        work=tmp_path / "work", json=tmp_path / "study.json", results=tmp_path / "results.md",
    )  # fmt: skip
    return Bench("digits-dit", options, silent())


def cell(row, target="2x", error=0.1, **facts):
    metrics = {"relative_l2": Metric(value=error, low=error / 2, high=error * 2, count=4, better="lower")}
    given = {"pipeline": "digits-dit", "source": "float", "fingerprint": "a", "metrics": metrics, "macs_ratio": 0.49}
    return CacheCell(target=target, row=row, **(given | facts))


def test_cells_are_measured_and_not_measured_twice(bench, monkeypatch):
    places = [
        ("float", "-", cache_bench.NO_PLAN),
        ("float", "2x", "even"),
        ("float", "2x", "fewer steps"),
        ("float", "2x", "fewer steps, DPM++"),
    ]
    for place in places:
        cache_study.fill(bench, *place)
    study = read_study(bench.options.json, CacheStudy)
    found = {cell.row: cell for cell in study.cells}
    assert [cell.status for cell in found.values()] == ["measured"] * 4
    assert found["even"].metrics["relative_l2"].value > 0
    assert found["even"].macs_ratio <= 0.5
    assert found["even"].codes["body"].startswith("C")
    assert found["even"].speedup > 0
    assert found["fewer steps"].macs_ratio == 0.5
    assert found["fewer steps"].options == {"steps": 3, "solver": None}
    other = found["fewer steps, DPM++"].metrics["relative_l2"].value
    assert 0 < other != found["fewer steps"].metrics["relative_l2"].value
    assert "relative_l2" not in found[cache_bench.NO_PLAN].metrics
    monkeypatch.setattr(cache_study, "treat", lambda *_: pytest.fail("measured again"))
    for place in places:
        cache_study.fill(bench, *place)


def test_a_row_may_name_what_it_treats(bench):
    place = ("float", "3x", "taylor, of the body")
    named = argparse.Namespace(row=[place[2]], source=None, target=None)
    assert list(cache_study.wanted_cells("digits-dit", named)) == [place, ("float", "5x", place[2])]
    cache_study.fill(bench, *place)
    (found,) = read_study(bench.options.json, CacheStudy).cells
    assert found.status == "measured"
    assert found.options["unit"] == "body"
    assert set(found.codes) == {"body"}
    assert found.macs_ratio <= 1 / 3


def test_what_breaks_in_one_cell_is_on_record(bench, monkeypatch):
    bench.__dict__["reference"] = None

    def broken(*_):
        raise UnsupportedError("out of reach.", mend="Ask for less.")

    monkeypatch.setattr(cache_study, "treat", broken)
    cache_study.fill(bench, "float", "5x", "dp")
    (found,) = read_study(bench.options.json, CacheStudy).cells
    assert found.status == "failed: out of reach. Ask for less."


def test_a_peer_is_as_strong_as_the_target_asks_for(bench):
    def switch_on_(pipe, strength):
        for block in list(pipe.transformer.transformer_blocks)[:strength]:
            block.forward = lambda hidden_states, *_, **__: hidden_states

    def make():
        return bench.load("zoo:digits-dit")

    peer, request = CachePeer("torch", switch_on_, (1, 2, 3, 4)), bench.ask("calibration", 1)
    ratios = [
        fit_strength(make, replace(peer, strengths=(number,)), request, 1.0).macs_ratio for number in (1, 2, 3, 4)
    ]
    assert ratios == sorted(ratios, reverse=True)
    found = fit_strength(make, peer, request, ratios[2] + 1e-6)
    assert (found.strength, found.macs_ratio) == (3, ratios[2])
    with pytest.raises(UnsupportedError, match="even 4 costs more"):
        fit_strength(make, peer, request, ratios[3] / 2)
    with pytest.raises(ConfigError, match="nowhere is not installed"):
        fit_strength(make, replace(peer, package="nowhere"), request, 0.5)


def test_a_row_of_diffusers_own_cache_is_measured(bench, monkeypatch):
    bench.options.steps, name = 12, "TaylorSeer, lite (diffusers)"
    own = Bench("shapes-mmdit", bench.options, silent())
    monkeypatch.setattr(cache_bench, "COUNTED", 1)
    monkeypatch.setitem(PEERS, name, replace(PEERS[name], strengths=(2, 3)))
    cache_study.fill(own, "float", "1.5x", name)
    (found,) = read_study(bench.options.json, CacheStudy).cells
    assert found.status == "measured"
    assert 0 < found.macs_ratio <= 0.6667
    assert found.strength == "2"
    assert 0 < found.metrics["relative_l2"].value < 1


def test_peers_have_their_places_in_the_table():
    assert set(PEERS) == set(CACHE_PEERS)
    assert {name for names in CACHE_PEERS.values() for name in names} <= set(PIPELINES)


def test_every_row_can_be_asked_for(bench):
    for name, row in ROWS.items():
        options = cache_bench.cell_options(bench, "3x", name)
        config = build_config(SearchCacheConfig, measure="never", **options)
        assert build_config(METHODS.load(row.method).CONFIG, **config.settings)
        assert set(row.sources) <= set(SOURCES)
        assert set(row.pipelines) <= set(PIPELINES)


def test_cells_are_those_that_make_sense():
    options = argparse.Namespace(row=None, source=None, target=None)
    for name in PIPELINES:
        places = list(cache_study.wanted_cells(name, options))
        assert len(places) == len(set(places))
        assert ("float", "2x", "encoder") in places or name in ("digits-dit", "shapes-mmdit")
        assert ("W8A8", "-", "no plan") in places
        assert not any(row == "evolve" for _, _, row in places)
        assert not any(row in FEWER and source != "float" for source, _, row in places)
    named = argparse.Namespace(row=["evolve"], source=["float"], target=["2x"])
    assert list(cache_study.wanted_cells("digits-dit", named)) == [("float", "2x", "evolve")]


def test_tables_compare_searched_plans_with_those_that_look_at_nothing():
    block = cache_block([cell("even", error=0.2), cell("dp", error=0.1), cell("fewer steps", error=0.4)], "facts")
    assert "- float, 2x: dp at 0.1 with 0.490 of the MACs, 0.50 times even with 0.490." in block
    assert block.index("| float | 2x | fewer steps |") < block.index("| float | 2x | even |")
    assert "| float | 2x | dp |" in block


def test_a_failure_stands_in_the_table():
    block = cache_block([cell("gated", metrics={}, macs_ratio=None, status="failed: no | way")], "")
    assert "| float | 2x | gated | failed: no / way |" in block


def test_tables_are_written_between_their_marks(tmp_path):
    file = tmp_path / "results.md"
    file.write_text("before\n<!-- cache:digits-dit -->\nold\n<!-- /cache:digits-dit -->\nafter\n")
    record_cell(tmp_path / "study.json", cell("dp"), CacheStudy)
    study = read_study(tmp_path / "study.json", CacheStudy)
    assert write_cache_tables(file, study, PIPELINES, {}) == ["digits-dit"]
    text = file.read_text()
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")


def test_the_results_have_a_place_for_every_pipeline():
    text = RESULTS.read_text()
    for name in PIPELINES:
        assert text.index(f"<!-- cache:{name} -->") < text.index(f"<!-- /cache:{name} -->")
    assert list(TARGETS.values()) == sorted(TARGETS.values())
    assert Path(cache_study.__file__).with_suffix(".json").name == cache_study.RECORD.name
