from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import dacc
from dacc import SearchCacheConfig, search_cache, verify_bundle
from dacc.core.cache_plan import CachePlan
from dacc.core.errors import BundleError, ConfigError, ModelError, QualityError, UnsupportedError
from dacc.core.manifest import Manifest, read_manifest
from dacc.core.reporter import Reporter, silent
from dacc.core.seeds import seed_stream
from dacc.runtime.cached import CachePlanWarning
from dacc.runtime.compare import relative_l2
from dacc.runtime.request import RunRequest
from dacc.runtime.trajectory import sample

QUICK = {"macs_ratio": 0.6, "steps": 8, "samples": 1, "measure": "never"}
REQUEST = RunRequest(seeds=(3,), num_inference_steps=8)


@pytest.fixture(scope="session")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a bundle with a plan; each config once, not to be changed."""
    root, made = tmp_path_factory.mktemp("cached"), dict[Any, Path]()

    def make(source: Path, **fields: Any) -> Path:
        config = SearchCacheConfig(**{**QUICK, **fields})
        key = (source, config.model_dump_json())
        if key not in made:
            made[key] = search_cache(source, config, output=root / f"{source.name}-{len(made)}", device="cpu")
        return made[key]

    return make


def plan_of(bundle: Path, name: str = "unet") -> CachePlan:
    record = read_manifest(bundle).components[name].cache
    assert record is not None
    return record.plan


@pytest.mark.parametrize(
    ("kind", "name", "unit"), [("unet_folder", "unet", "unet_cut"), ("dit_folder", "transformer", "block_range")]
)
@pytest.mark.parametrize("method", ["deepcache", "dp", "taylor"])
def test_a_search_gives_an_intact_bundle_whose_plan_the_loader_installs(request, cached, kind, name, unit, method):
    source = request.getfixturevalue(kind)
    settings = {"rank": 0} if method == "dp" else {}  # what mixing costs is counted in test_mixing.py
    bundle = cached(source, method=method, macs_ratio=0.8, settings=settings)
    assert verify_bundle(bundle) == []
    plan = plan_of(bundle, name)
    assert plan.units[0].kind == ("output" if method == "taylor" else unit)
    record = read_manifest(bundle).components[name]
    assert record.cache.macs_ratio <= 0.8
    full, saved = plan.macs.full, sum(plan.macs.units.values())
    codes = next(iter(plan.codes.values()))
    skipped = 8 - codes.count("C")
    assert set(codes) == {"C", "F" if method == "taylor" else "R"}
    assert record.cache.macs_ratio == pytest.approx(1 - saved * skipped / (full * 8), abs=1e-12)
    told = {"calls": 8, "computed": codes.count("C")}
    chosen = dict(record.cache.chosen)
    if method != "deepcache":
        chosen.pop("ridge", None)  # where fitted forecasts were better
        assert chosen.pop("trials") <= (40 if method == "taylor" else 24)
        assert chosen.pop("relative_l2") > 0
    assert chosen == told
    pipe: Any = dacc.load(bundle, device="cpu")
    cached_latents = sample(pipe, REQUEST).latents
    with dacc.no_cache(pipe):
        full_latents = sample(pipe, REQUEST).latents
    wanted = sample(dacc.load(source, device="cpu"), REQUEST).latents
    assert torch.equal(full_latents, wanted)
    with pytest.warns(CachePlanWarning, match=f"{name} of .* dacc.load") as told:
        plain = diffusers.DiffusionPipeline.from_pretrained(bundle)
    assert [warning.filename for warning in told] == [__file__]  # once, and where the user wrote it
    assert torch.equal(sample(plain, REQUEST).latents, wanted)
    assert not torch.equal(cached_latents, full_latents)


def test_weights_and_everything_else_are_carried_as_they_were(unet_folder, cached):
    bundle = cached(unet_folder, method="deepcache")
    for file in unet_folder.rglob("*"):
        if file.is_file():
            assert (bundle / file.relative_to(unet_folder)).read_bytes() == file.read_bytes()


def test_the_same_search_gives_the_same_bytes_and_in_a_fresh_process_the_same_latents(unet_folder, cached, run_python):
    bundle = cached(unet_folder, method="dp")
    again = search_cache(unet_folder, SearchCacheConfig(**QUICK, method="dp"), output="again", device="cpu")
    assert (bundle / "dacc_manifest.json").read_bytes() == (again / "dacc_manifest.json").read_bytes()
    code = """
import sys, torch, dacc
from dacc.runtime.request import RunRequest
from dacc.runtime.trajectory import sample
torch.save(sample(dacc.load(sys.argv[1], device="cpu"), RunRequest(seeds=(3,), num_inference_steps=8)).latents, "l.pt")
"""
    run_python(code, bundle)
    assert torch.equal(torch.load("l.pt"), sample(dacc.load(bundle, device="cpu"), REQUEST).latents)


def test_the_effect_and_the_speed_are_measured_against_the_source_without_plan(unet_folder, cached):
    bundle = cached(unet_folder, method="deepcache", measure="auto")
    effect = read_manifest(bundle).passes[-1].effect["pipeline"]
    assert (effect.seeds, effect.steps) == (4, 8)
    assert 0 < effect.relative_l2 < 1
    facts = json.loads((bundle / "dacc_run.json").read_text())
    assert facts["speedup_measured"] > 0


def test_a_result_that_is_there_is_returned_at_once(unet_folder, cached, monkeypatch):
    bundle = cached(unet_folder, method="deepcache")
    monkeypatch.setattr("dacc.runtime.load.load_source", lambda *_, **__: pytest.fail("loaded"))
    config = SearchCacheConfig(**QUICK, method="deepcache")
    assert search_cache(unet_folder, config, output=bundle, device="cpu") == bundle


def test_call_times_of_all_that_auto_tried_are_kept_and_decide_again(unet_folder, tmp_path):
    config = SearchCacheConfig(**{**QUICK, "macs_ratio": None}, speedup=1.2, method="auto")
    bundle = search_cache(unet_folder, config, output="out", device="cpu")
    costs = json.loads((bundle / "dacc_run.json").read_text())["cost_profile"]["unet"]
    assert len({cost["unit"] for cost in costs}) == len(costs) == 2  # a cut, and the output for forecasts
    told = silent()
    again = search_cache(
        unet_folder, config, output="again", cost_profile=bundle / "dacc_run.json", device="cpu", reporter=told
    )
    assert plan_of(again) == plan_of(bundle)
    assert not any("left out" in notice for notice in told.notices)


def test_the_runs_of_a_search_draw_what_is_asked_for(sd_folder, monkeypatch, tmp_path):
    seen = []
    call = diffusers.StableDiffusionPipeline.__call__

    @functools.wraps(call)
    def watched(pipe, *args, **kwargs):
        seen.append((kwargs["prompt"], kwargs.get("negative_prompt"), kwargs.get("height")))
        return call(pipe, *args, **kwargs)

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "__call__", watched)
    asked = {"prompts": ("one", "two"), "negative_prompt": "dull", "height": 32, "width": 32, "method": "deepcache"}
    told = silent()
    search_cache(sd_folder, SearchCacheConfig(**QUICK, **asked), output="out", device="cpu", reporter=told)
    assert {height for _, _, height in seen} == {32}
    assert all(set(prompts) <= {"one", "two"} and set(negative) == {"dull"} for prompts, negative, _ in seen)
    assert not any("neutral" in notice for notice in told.notices)


def test_call_times_of_a_profile_decide_in_place_of_the_clock(unet_folder, tmp_path):
    unit = {"kind": "unet_cut", "id": "deep", "block": 0, "layer": 0}
    cost = {"unit": json.dumps(unit, separators=(",", ":")), "full_seconds": 1.0, "partial_seconds": 0.2}
    profile = tmp_path / "costs.json"
    profile.write_text(json.dumps({"cost_profile": {"unet": [cost]}}))
    config = SearchCacheConfig(**{**QUICK, "macs_ratio": None}, speedup=2, method="deepcache")
    bundle = search_cache(unet_folder, config, output="out", cost_profile=profile, device="cpu")
    assert plan_of(bundle).codes["deep"].count("C") == 3  # 3 + 5 / 5 = 8 / 2
    profile.write_text(json.dumps({"cost_profile": {"unet": [{**cost, "unit": "other"}]}}))
    with pytest.raises(ConfigError, match="another unit.*--cost-profile"):
        search_cache(unet_folder, config, output="other", cost_profile=profile, device="cpu")
    for text, said in (("{}", "no cost profile"), ('{"cost_profile": {"unet": 3}}', "cannot be read")):
        profile.write_text(text)
        with pytest.raises(ConfigError, match=said):
            search_cache(unet_folder, config, output="other", cost_profile=profile, device="cpu")
    assert not Path("other").exists()


@pytest.mark.parametrize("unit", ["cut:0.1", "encoder", "body", "output", "module:mid_block"])
def test_other_units_of_a_unet(unet_folder, cached, unit):
    plan = plan_of(cached(unet_folder, method="deepcache", unit=unit, macs_ratio=0.95))
    assert plan.units[0].kind in ("unet_cut", "unet_encoder", "unet_body", "output", "module")
    assert "R" in next(iter(plan.codes.values()))


def test_encoder_propagation_treats_the_encoder_whoever_names_it(unet_folder, cached):
    bundles = [cached(unet_folder, method="encoder", macs_ratio=0.95, unit=unit) for unit in ("auto", "encoder")]
    plans = [plan_of(bundle) for bundle in bundles]
    assert [plan.units[0].kind for plan in plans] == ["unet_encoder"] * 2
    assert set(plans[0].codes["encoder"]) == {"C", "R"}


def test_a_gate_gets_the_threshold_that_meets_the_target_and_its_cost_is_counted(dit_folder, cached):
    settings = {"warmup": 2, "signal": "forecast"}
    bundle = cached(dit_folder, method="gated", macs_ratio=0.85, settings=settings)
    record = read_manifest(bundle).components["transformer"].cache
    assert record.plan.codes == {"body": "CCGGGGGC"}
    assert record.plan.gates["body"].threshold == record.chosen["threshold"] > 0
    assert record.macs_ratio <= 0.85
    assert 3 <= record.chosen["computed"] <= 8
    assert 1 <= record.chosen["tried"] <= 10
    sample(dacc.load(bundle, device="cpu"), REQUEST)


def test_auto_keeps_the_nearest_of_what_it_tried(unet_folder, cached):
    record = read_manifest(cached(unet_folder)).components["unet"].cache
    figures = {name: record.chosen[f"relative_l2_{name}"] for name in ("deepcache", "taylor", "dp")}
    assert record.method == min(figures, key=figures.get)
    request = RunRequest(seeds=seed_stream("auto", 0, 1), num_inference_steps=8)
    wanted = sample(dacc.load(unet_folder, device="cpu"), request).latents
    for name, figure in figures.items():
        bundle = cached(unet_folder, method=name)
        found = relative_l2(wanted, sample(dacc.load(bundle, device="cpu"), request).latents).mean().item()
        assert found == pytest.approx(figure, abs=1e-5)
        if name == record.method:
            assert plan_of(bundle) == record.plan


def test_auto_leaves_out_what_cannot_reach_the_target(dit_folder, cached):
    for name in ("deepcache", "dp"):  # the block that they leave fresh costs too much
        with pytest.raises(UnsupportedError, match="this unit cannot give"):
            cached(dit_folder, macs_ratio=0.4, method=name)
    bundle = cached(dit_folder, macs_ratio=0.4)
    record = read_manifest(bundle).components["transformer"].cache
    assert record.method == "taylor"
    notices = read_manifest(bundle).passes[-1].notices
    assert [notice.split(":")[1].split()[0] for notice in notices if "left out" in notice] == ["deepcache", "dp"]


def test_auto_leaves_out_a_plan_whose_runs_overflow(unet_folder, monkeypatch):
    def overflowing(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        return relative_l2(wanted, found) * next(factors)

    factors = iter([float("nan"), 1.0, 1.0])  # of deepcache, taylor and dp
    monkeypatch.setattr("dacc.cache.auto.relative_l2", overflowing)
    manifest = read_manifest(search_cache(unet_folder, SearchCacheConfig(**QUICK), output="out", device="cpu"))
    record = manifest.components["unet"].cache
    assert record.method != "deepcache"
    assert "relative_l2_deepcache" not in record.chosen
    assert "method auto: deepcache was left out: the runs with its plan are not finite." in manifest.passes[-1].notices


def test_fields_of_a_forecast_reach_the_plan(unet_folder, cached):
    plan = plan_of(cached(unet_folder, method="taylor", settings={"order": 2, "x": "sigma", "form": "published"}))
    found = plan.predict["output"]
    assert (found.order, found.x, found.form) == (2, "sigma", "published")


def error_of(source: Path, bundle: Path) -> float:
    """Of the runs that decide."""
    request = RunRequest(seeds=seed_stream("trials", 0, 1), num_inference_steps=8)
    wanted, found = (sample(dacc.load(folder, device="cpu"), request).latents for folder in (source, bundle))
    return relative_l2(wanted, found).mean().item()


def test_whole_runs_choose_order_and_calls_of_forecasts_and_the_manifest_tells(unet_folder, cached):
    bundle = cached(unet_folder, method="taylor")
    chosen = read_manifest(bundle).components["unet"].cache.chosen
    assert chosen["relative_l2"] == pytest.approx(error_of(unet_folder, bundle), rel=1e-3)
    assert 6 < chosen["trials"] <= 40
    for order in (1, 2, 3):
        for spacing in ("searched", "even"):
            settings = {"order": order, "spacing": spacing, "trials": 0}
            other = cached(unet_folder, method="taylor", settings=settings)
            assert "trials" not in read_manifest(other).components["unet"].cache.chosen
            assert chosen["relative_l2"] <= error_of(unet_folder, other) * 1.001
    alone = cached(unet_folder, method="taylor", settings={"order": 1, "spacing": "searched"})
    assert plan_of(alone).predict["output"].order == 1


def test_whole_runs_move_the_calls_of_a_dynamic_programme(unet_folder, cached):
    first = cached(unet_folder, method="dp", settings={"trials": 0, "correct": False})
    assert "trials" not in read_manifest(first).components["unet"].cache.chosen
    moved = cached(unet_folder, method="dp", settings={"correct": False})
    chosen = read_manifest(moved).components["unet"].cache.chosen
    assert 1 < chosen["trials"] <= 24
    assert chosen["relative_l2"] == pytest.approx(error_of(unet_folder, moved), rel=1e-3)
    assert chosen["relative_l2"] <= error_of(unet_folder, first) * 1.001
    plans = plan_of(first), plan_of(moved)
    assert plans[0].codes["deep"].count("C") == plans[1].codes["deep"].count("C")


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"method": "deepcash"}, ConfigError, "deepcache"),
        ({"unit": "cut:9.0"}, ConfigError, "--unit cut:9.0"),
        ({"unit": "module:mid_blok"}, ConfigError, "mid_block"),
        ({"macs_ratio": 0.01}, UnsupportedError, "best that can be reached.*--macs-ratio"),
        ({"method": "encoder", "unit": "cut:0.0"}, ConfigError, "--method encoder treats --unit encoder"),
        ({"method": "taylor", "settings": {"warmup": 8}}, UnsupportedError, "at least 8 calls compute"),
        ({"method": "gated", "settings": {"warmup": 1}}, UnsupportedError, "this unit has none.*--unit blocks:1-N"),
        ({"method": "auto", "settings": {"cost": "feature"}}, ConfigError, "--set cost is a field of one method"),
        ({"component": ("vae",)}, ConfigError, "no component 'vae'"),
        ({"settings": {"form": "odd"}}, ConfigError, "form"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(unet_folder, fields, error, said):
    config = SearchCacheConfig(**{**QUICK, "method": "deepcache", **fields})
    with pytest.raises(error, match=said):
        search_cache(unet_folder, config, output="out", device="cpu")
    assert not Path("out").exists()


def test_a_floor_that_is_missed_leaves_nothing(unet_folder):
    config = SearchCacheConfig(**{**QUICK, "method": "deepcache", "measure": "auto"})
    with pytest.raises(QualityError, match=r"psnr is .*--macs-ratio"):
        search_cache(unet_folder, config, output="out", require=("psnr>=101",), device="cpu")
    assert not Path("out").exists()


def test_a_plan_on_a_quantized_source_is_searched_on_its_integers(unet_folder, bundle_of, cached):
    quantized = bundle_of(unet_folder, bits=8)
    bundle = cached(quantized, method="deepcache")
    manifest = read_manifest(bundle)
    assert [step.command for step in manifest.passes] == ["quantize", "search-cache"]
    assert manifest.components["unet"].quantization is not None
    assert manifest.history == [read_manifest(quantized).sha256()]
    assert verify_bundle(bundle) == []
    sample(dacc.load(bundle, device="cpu"), REQUEST)


def test_quantizing_a_cached_bundle_keeps_the_plan_and_says_so(unet_folder, cached):
    config = dacc.QuantizeConfig(bits=8, measure="never")
    reporter = Reporter(quiet=True)
    source = cached(unet_folder, method="deepcache")
    bundle = dacc.quantize_pipeline(source, config, output="q", device="cpu", reporter=reporter)
    assert plan_of(bundle) == plan_of(source)
    assert any("plan of unet was searched before" in notice for notice in reporter.notices)
    sample(dacc.load(bundle, device="cpu"), REQUEST)


def test_a_second_search_replaces_the_plan_with_a_notice(unet_folder, cached):
    reporter = Reporter(quiet=True)
    first = cached(unet_folder, method="deepcache")
    config = SearchCacheConfig(**{**QUICK, "macs_ratio": 0.9, "method": "deepcache"})
    second = search_cache(first, config, output="second", device="cpu", reporter=reporter)
    assert plan_of(second) != plan_of(first)
    assert any("is replaced" in notice for notice in reporter.notices)


def edited(bundle: Path, target: Path, change: Callable[[Any], None]) -> Path:
    """A copy of a bundle whose manifest went through `change`."""
    shutil.copytree(bundle, target)
    file = target / "dacc_manifest.json"
    raw = json.loads(file.read_text())
    change(raw["components"]["unet"]["cache"])
    file.write_text(json.dumps(raw))
    return target


def test_an_edited_plan_is_refused_by_name(unet_folder, cached, tmp_path):
    bundle = cached(unet_folder, method="deepcache")

    def other_codes(cache: Any) -> None:
        cache["plan"]["codes"]["deep"] = "CRRRRRRR"

    with pytest.raises(BundleError, match="cache plan of unet was edited"):
        dacc.load(edited(bundle, tmp_path / "a", other_codes), device="cpu")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": "0" * 64}, "searched on other weights"),
        ({"class_name": "UNet2DConditionModel"}, "is for a UNet2DConditionModel; this is a UNet2DModel"),
        ({"config_sha256": "0" * 64}, "with another config"),
    ],
)
def test_a_plan_of_another_model_is_refused_by_what_differs(unet_folder, cached, tmp_path, change, said):
    def other(cache: Any) -> None:
        cache["plan"] |= change
        cache["plan_sha256"] = CachePlan(**cache["plan"]).sha256()

    moved = edited(cached(unet_folder, method="deepcache"), tmp_path / "moved", other)
    with pytest.raises(ModelError, match=said):
        dacc.load(moved, device="cpu")


def test_an_exact_plan_refuses_other_steps(unet_folder, cached):
    pipe: Any = dacc.load(cached(unet_folder, method="deepcache", rule="exact"), device="cpu")
    with pytest.raises(ConfigError, match="8 DDIMScheduler calls, running 9"):
        sample(pipe, REQUEST.model_copy(update={"num_inference_steps": 9}))


def test_a_manifest_with_a_plan_follows_the_schema(unet_folder, cached):
    from jsonschema import Draft202012Validator

    raw = json.loads((cached(unet_folder, method="deepcache") / "dacc_manifest.json").read_text())
    Draft202012Validator(Manifest.model_json_schema()).validate(raw)
