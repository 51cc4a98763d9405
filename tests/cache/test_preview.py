from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dacc import SearchCacheConfig, search_cache
from dacc.cache.config import parse_unit, unit_name
from dacc.cache.preview import ComponentPreview, preview_search
from dacc.cache.profile import CallCost, told
from dacc.core.errors import ConfigError, UnsupportedError
from dacc.core.manifest import CacheRecord, read_manifest
from dacc.core.reporter import silent

QUICK = {"macs_ratio": 0.8, "steps": 6, "samples": 1, "measure": "never"}


def preview(source: Path, **fields: Any) -> ComponentPreview:
    found = preview_search(source, SearchCacheConfig(**{**QUICK, **fields}), device="cpu", reporter=silent())
    (component,) = found.components.values()
    return component


def searched(source: Path, output: Path, **fields: Any) -> CacheRecord:
    bundle = search_cache(source, SearchCacheConfig(**{**QUICK, **fields}), output=output, device="cpu")
    (record,) = read_manifest(bundle).components.values()
    return record.cache


@pytest.mark.parametrize("method", ["deepcache", "taylor"])
def test_it_tells_what_the_search_then_does(dit_folder, tmp_path, method):
    found = preview(dit_folder, method=method).methods[method]
    record = searched(dit_folder, tmp_path / "out", method=method)
    plan = record.plan
    assert (found.calls, found.macs) == (plan.calls, plan.macs.full)
    (unit,) = plan.units
    assert found.units == {unit_name(unit): plan.macs.units[unit.id] / plan.macs.full}
    assert found.computed == record.chosen["computed"]
    assert found.macs_ratio == pytest.approx(record.macs_ratio, abs=1e-12)


def test_a_correction_that_mixes_channels_is_paid_for(unet_folder):
    plain, mixing = (
        preview(unet_folder, method="dp", samples=2, settings={"rank": rank}).methods["dp"] for rank in (0, 8)
    )
    assert mixing.units == plain.units
    assert mixing.macs_ratio - plain.macs_ratio > -1 / 6  # one computed call less at most
    assert (mixing.computed, mixing.macs_ratio) != (plain.computed, plain.macs_ratio)
    assert mixing.macs_ratio <= 0.8


def test_of_evolve_it_tells_every_unit_and_what_a_plan_may_cost(dit_folder):
    found = preview(dit_folder, method="evolve").methods["evolve"]
    assert (found.computed, found.macs_ratio) == (None, 0.8)
    assert set(found.units) == {
        f"module:transformer_blocks.{block}.{part}" for block in range(2) for part in ("attn1", "ff")
    }
    with pytest.raises(UnsupportedError, match="these units cannot give a MAC ratio"):
        preview(dit_folder, method="evolve", macs_ratio=0.05)


def test_of_a_schedule_it_tells_what_it_costs(dit_folder, tmp_path):
    searched(dit_folder, tmp_path / "out", method="evolve", settings={"generations": 1, "population": 4})
    file = tmp_path / "out" / "dacc_ecad_transformer.json"
    own = {"method": "ecad", "settings": {"file": str(file)}, "macs_ratio": None, "steps": None}
    found = preview(dit_folder, **own).methods["ecad"]
    record = searched(dit_folder, tmp_path / "given", **own)
    assert found.macs_ratio == record.macs_ratio
    assert found.computed == record.chosen["computed"]


def test_of_auto_it_tells_every_method_and_who_would_be_left_out(dit_folder):
    found = preview(dit_folder, method="auto")
    assert set(found.methods) == {"deepcache", "taylor", "dp"}
    assert found.out_of_reach == {}
    least = preview(dit_folder, method="auto", macs_ratio=0.4)
    assert set(least.methods) == {"taylor"}
    assert set(least.out_of_reach) == {"deepcache", "dp"}
    with pytest.raises(UnsupportedError, match="cannot give a MAC ratio of 0.01"):
        preview(dit_folder, method="auto", macs_ratio=0.01)


def test_calls_of_one_unit_are_timed_once(dit_folder, monkeypatch):
    timed: list[str] = []

    def time_calls(denoiser: Any, units: Any, *_: Any) -> CallCost:
        timed.append(told(units))
        return CallCost(unit=told(units), full_seconds=1.0, partial_seconds=0.25)

    monkeypatch.setattr("dacc.cache.scene.time_calls", time_calls)
    found = preview(dit_folder, method="auto", macs_ratio=None, speedup=1.5)
    assert len(timed) == len(set(timed)) == 2  # with and without the outermost blocks
    assert found.methods["taylor"].computed == 3  # 3 + 3 / 4 calls of 6 cost less than 4 do
    assert {own.cost.partial_seconds for own in found.methods.values() if own.cost} == {0.25}


def test_it_refuses_what_the_search_refuses(unet_folder):
    with pytest.raises(ConfigError, match="no cache search"):
        preview(unet_folder, method="deepcahe")
    with pytest.raises(ConfigError, match="cut:9.9"):
        preview(unet_folder, method="deepcache", unit="cut:9.9")
    with pytest.raises(ConfigError, match="centre"):
        preview(unet_folder, method="deepcache", settings={"centre": 3})


@pytest.mark.parametrize("text", ["cut:1.2", "encoder", "body", "output", "blocks:1-7", "module:a.b"])
def test_a_unit_is_named_as_it_is_asked_for(text):
    assert unit_name(parse_unit(text, stacks=("blocks",))) == text
