from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dacc import SearchCacheConfig, search_cache, verify_bundle
from dacc.cache.ecad import read_schedule, schedule_document
from dacc.core.errors import ConfigError, UnsupportedError
from dacc.core.manifest import read_manifest
from dacc.core.reporter import Reporter

QUICK = {"samples": 1, "measure": "never", "method": "ecad"}
FLUX_PARTS = ("full_attn", "full_ff", "full_ff_context")
SINGLE_PARTS = ("single_attn", "single_proj_mlp", "single_proj_out")


def document(rows: list[dict[str, dict[str, bool]]], **head: Any) -> dict[str, Any]:
    """A schedule as ECAD writes it."""
    blocks = [block for block in rows[0] if not block.startswith("single")]
    schedule = {f"{number:03d}": row for number, row in enumerate(rows)}
    facts = {"num_blocks": len(blocks), "num_inference_steps": len(rows), "name": "x", "attributes": {}, **head}
    return {"cache_schedule": {**facts, "schedule": schedule}, "config": {"guidance": 4.5}, "metrics": {}}


def dit_rows() -> list[dict[str, dict[str, bool]]]:
    """Of two blocks and four steps."""
    table = {("0", "attn1"): "1010", ("0", "ff"): "1001", ("1", "attn1"): "1100", ("1", "ff"): "1111"}
    return [
        {
            block: {part: table[block, part][step] == "1" for part in ("attn1", "ff") if (block, part) in table}
            for block in ("0", "1")
        }
        for step in range(4)
    ]


def flux_rows() -> list[dict[str, dict[str, bool]]]:
    return [
        {
            "0": {part: (step + number) % 2 == 0 or step == 0 for number, part in enumerate(FLUX_PARTS)},
            "single_0": {part: (step + number) % 3 == 0 or step == 0 for number, part in enumerate(SINGLE_PARTS)},
        }
        for step in range(3)
    ]


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Any], Path]:
    """Writes a schedule file."""

    def write(content: Any) -> Path:
        file = tmp_path / "schedule.json"
        file.write_text(json.dumps(content))
        return file

    return write


def test_a_schedule_becomes_a_plan_and_comes_out_as_it_went_in(dit_folder, written):
    file = written(document(dit_rows()))
    bundle = search_cache(
        dit_folder, SearchCacheConfig(**QUICK, settings={"file": str(file)}), output="out", device="cpu"
    )
    assert verify_bundle(bundle) == []
    record = read_manifest(bundle).components["transformer"].cache
    codes = record.plan.codes
    assert codes["transformer_blocks.0.attn1"] == "CRCR"
    assert codes["transformer_blocks.0.ff"] == "CRRC"
    assert codes["transformer_blocks.1.attn1"] == "CCRR"
    assert "transformer_blocks.1.ff" not in codes  # always computed
    assert record.chosen == {"calls": 4, "computed": 1}
    assert 0 < record.macs_ratio < 1
    assert read_manifest(bundle).passes[-1].config["settings"] == {"file": "schedule.json"}
    again = json.loads((bundle / "dacc_ecad_transformer.json").read_text())
    assert again["cache_schedule"]["schedule"] == document(dit_rows())["cache_schedule"]["schedule"]
    assert again["cache_schedule"]["num_blocks"] == 2
    assert read_schedule(bundle / "dacc_ecad_transformer.json") == read_schedule(file)


def test_both_lists_of_blocks_of_a_flux(flux_pipeline, written):
    from dacc.core.families import find_family

    transformer = flux_pipeline().transformer
    modules = [name for name, _ in transformer.named_modules()]
    stacks = find_family(type(transformer).__name__)[0].stacks
    schedule = read_schedule(written(document(flux_rows(), num_single_blocks=1)))
    units = schedule.units(stacks, modules, "Flux")
    codes = {unit.path: own for unit, own in units.items()}
    assert codes["transformer_blocks.0.ff_context"] == "CRC"
    assert codes["single_transformer_blocks.0.proj_mlp"] == "CRC"
    assert codes["single_transformer_blocks.0.attn"] == "CRR"

    from ...runtime.cache_plans import plan_for

    plan = plan_for(flux_pipeline(), dict(units))
    made = schedule_document(plan, stacks, modules, 7)
    assert made["cache_schedule"]["schedule"] == document(flux_rows())["cache_schedule"]["schedule"]
    assert (made["cache_schedule"]["num_blocks"], made["cache_schedule"]["num_single_blocks"]) == (1, 1)
    assert made["metrics"] == {"total_macs": 7}


def test_a_first_step_that_reuses_computes_with_a_notice(dit_folder, written):
    rows = dit_rows()
    rows[0]["0"]["attn1"] = False
    reporter = Reporter(quiet=True)
    config = SearchCacheConfig(**QUICK, settings={"file": str(written(document(rows)))})
    bundle = search_cache(dit_folder, config, output="out", device="cpu", reporter=reporter)
    assert read_manifest(bundle).components["transformer"].cache.plan.codes["transformer_blocks.0.attn1"] == "CRCR"
    assert any("reuses at the first step" in notice for notice in reporter.notices)


def test_plans_of_other_units_have_no_schedule_file(unet_pipeline):
    from ...runtime.cache_plans import CUT, plan_for

    pipe = unet_pipeline()
    modules = [name for name, _ in pipe.unet.named_modules()]
    assert schedule_document(plan_for(pipe, {CUT: "CRR"}), ("transformer_blocks",), modules, 0) is None


def edited(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    content = document(dit_rows())
    change(content["cache_schedule"])
    return content


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "no cache_schedule"),
        (edited(lambda head: head.update(num_inference_steps=5)), "num_inference_steps is 5"),
        (edited(lambda head: head["schedule"].update({"x": {}})), "not named by its number"),
        (edited(lambda head: head["schedule"]["001"].pop("1")), "same blocks and components"),
        (edited(lambda head: head["schedule"]["001"].update(mid={})), "'mid', which is not a block"),
        (edited(lambda head: head["schedule"]["001"]["1"].update(ff=1)), "neither true nor false"),
    ],
)
def test_what_is_no_schedule_is_refused(dit_folder, written, content, said):
    config = SearchCacheConfig(**QUICK, settings={"file": str(written(content))})
    with pytest.raises(ConfigError, match=said):
        search_cache(dit_folder, config, output="out", device="cpu")


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"steps": 5}, UnsupportedError, "has 4 steps; a run of 5 steps.*makes 5 calls"),
        ({"macs_ratio": 0.5}, ConfigError, "aims at nothing"),
        ({"settings": {}}, ConfigError, "file"),
        ({"settings": {"file": "nowhere.json"}}, ConfigError, "is no file"),
    ],
)
def test_what_does_not_belong_to_a_schedule_is_refused(dit_folder, written, fields, error, said):
    settings = {"file": str(written(document(dit_rows())))}
    config = SearchCacheConfig(**{**QUICK, "settings": settings, **fields})
    with pytest.raises(error, match=said):
        search_cache(dit_folder, config, output="out", device="cpu")


def test_a_schedule_of_another_model_is_refused(dit_folder, written):
    rows = [{**row, "2": {"attn1": True, "ff": True}} for row in dit_rows()]
    config = SearchCacheConfig(**QUICK, settings={"file": str(written(document(rows)))})
    with pytest.raises(UnsupportedError, match=r"attn1 of block 2.*no transformer_blocks\.2\.attn1"):
        search_cache(dit_folder, config, output="out", device="cpu")
