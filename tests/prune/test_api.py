"""From a pipeline folder to a smaller one: what is written, who can load it, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dacc
from dacc import (
    ExportConfig,
    PruneConfig,
    QuantizeConfig,
    SearchCacheConfig,
    export_pipeline,
    inspect_pipeline,
    prune_pipeline,
    quantize_pipeline,
    search_cache,
    verify_bundle,
)
from dacc.core.cache_plan import CORRECTION_NAME
from dacc.core.errors import ConfigError, ModelError, UnsupportedError
from dacc.core.manifest import read_manifest
from dacc.core.reporter import Reporter
from dacc.prune.config import METHODS
from dacc.prune.decide import decide
from dacc.prune.remove import plan_removal
from dacc.prune.settings import ScoredConfig
from dacc.prune.sources import refuse_other_residuals
from dacc.prune.teacher import Errors
from dacc.runtime.passthrough import Passthrough, skipping
from dacc.runtime.request import RunRequest
from dacc.runtime.trajectory import sample

from . import toys

REQUEST = RunRequest(seeds=(3,), num_inference_steps=5)
PLAIN = """
import sys
sys.modules["dacc"] = None
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], use_safetensors=True, local_files_only=True)
torch.save(sum(value.numel() for value in pipe.components[sys.argv[2]].parameters()), "parameters.pt")
"""


def latents_of(folder: Path) -> torch.Tensor:
    return sample(dacc.load(folder, device="cpu"), REQUEST).latents


def test_a_pruned_transformer_is_what_plain_diffusers_loads(deep_dit, pruned, run_python):
    bundle = pruned(deep_dit, ratio=0.3)
    assert verify_bundle(bundle) == []
    record = read_manifest(bundle).components["transformer"]
    pruning = record.pruning
    assert (record.parameters, pruning.identity_modules) == (pruning.parameters_after, ())
    assert pruning.config["num_layers"].model_dump() == {"before": 6, "after": 4}
    removed = [name for name, unit in pruning.units.items() if unit.removed]
    assert len(removed) == 2
    run_python(PLAIN, bundle, "transformer")
    assert torch.load("parameters.pt") == pruning.parameters_after
    pipe = dacc.load(deep_dit, device="cpu")
    with skipping(pipe.transformer, removed):
        wanted = sample(pipe, REQUEST).latents
    found = latents_of(bundle)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    before, after = (
        (folder / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size for folder in (deep_dit, bundle)
    )
    gone = pruning.parameters_before - pruning.parameters_after
    assert before - after == pytest.approx(4 * gone, rel=0.03)
    scores = [unit.score for unit in pruning.units.values()]
    assert pruning.error == pytest.approx(pruning.additivity * sum(pruning.units[name].score for name in removed))
    assert all(score > 0 for score in scores)


def test_a_ratio_of_latency_counts_what_units_take_of_a_call(deep_dit, inputs_of, monkeypatch):
    taken = [0.02, 0.3, 0.02, 0.02, 0.02, 0.02]  # seconds of a call of one

    def told(actions, *_):
        return [[1.0], *([1 - part] for part in taken[: len(actions) - 1])]

    monkeypatch.setattr("dacc.prune.decide.measure_in_turns", told)
    given = {"calib": inputs_of(deep_dit), "device": "cpu"}
    config = PruneConfig(ratio=0.25, method="score", settings={"by": "latency"}, measure="never")
    bundle = prune_pipeline(deep_dit, config, output="fast", **given)
    units = read_manifest(bundle).components["transformer"].pruning.units
    assert [unit.removed for unit in units.values()][1]  # nothing reaches a quarter without it
    facts = json.loads((bundle / "dacc_run.json").read_text())["latency_ms"]["transformer"]
    assert facts["whole"] == pytest.approx(1000)
    assert [facts[name] for name in units] == pytest.approx([1000 * part for part in taken[: len(units)]])
    with pytest.raises(UnsupportedError, match="latency"):
        prune_pipeline(deep_dit, config.model_copy(update={"ratio": 0.6}), output="no", **given)


def test_what_a_config_cannot_tell_loads_with_dacc_and_is_refused_without(deep_unet, pruned, run_python):
    bundle = pruned(deep_unet, method="vdmini")  # another number of layers in each stage
    pruning = read_manifest(bundle).components["unet"].pruning
    assert set(pruning.config) == {"mid_block_type"}
    assert "up_blocks.1.resnets.1" in pruning.identity_modules
    ran = run_python(PLAIN, bundle, "unet", check=False)
    assert ran.returncode != 0
    assert "dacc" in ran.stderr
    pipe = dacc.load(bundle, device="cpu")
    assert all(isinstance(pipe.unet.get_submodule(name), Passthrough) for name in pruning.identity_modules)
    whole = dacc.load(deep_unet, device="cpu")
    removed = [name for unit in pruning.units.values() if unit.removed for name in unit.modules]
    with skipping(whole.unet, removed):
        wanted = sample(whole, REQUEST).latents
    assert torch.allclose(sample(pipe, REQUEST).latents, wanted, atol=1e-5)
    pipe.save_pretrained("again")
    assert torch.allclose(latents_of(Path("again")), latents_of(bundle), rtol=1e-4)
    with pytest.raises(UnsupportedError, match="pass on what enters them.*--lossy"):
        export_pipeline(bundle, ExportConfig(format="safetensors-bf16"), output="exported")
    small = quantize_pipeline(bundle, QuantizeConfig(bits=8, measure="never"), output="small", device="cpu")
    record = read_manifest(small).components["unet"]
    assert record.pruning == pruning
    assert record.parameters == pruning.parameters_after
    error = (latents_of(small) - wanted).norm() / wanted.norm()
    assert error < 0.1


def test_a_pruned_bundle_is_quantized_searched_and_exported_like_any_other(deep_dit, pruned):
    bundle = pruned(deep_dit, ratio=0.3)
    small = quantize_pipeline(bundle, QuantizeConfig(bits=8, measure="never"), output="small", device="cpu")
    plan = SearchCacheConfig(macs_ratio=0.8, steps=5, samples=1, measure="never", method="deepcache")
    cached = search_cache(small, plan, output="cached", device="cpu")
    record = read_manifest(cached).components["transformer"]
    assert (record.pruning.method, record.quantization.method, record.cache.method) == ("score", "rtn", "deepcache")
    assert [done.command for done in read_manifest(cached).passes] == ["prune", "quantize", "search-cache"]
    assert torch.isfinite(latents_of(cached)).all()
    exported = export_pipeline(bundle, ExportConfig(format="safetensors-bf16"), output="exported")
    assert json.loads((exported / "transformer" / "config.json").read_text())["num_layers"] == 4
    told = inspect_pipeline(cached, device="cpu").components["transformer"].pruning
    assert told.startswith("score: 0.")
    with pytest.raises(UnsupportedError, match="--from-reference"):
        prune_pipeline(small, PruneConfig(ratio=0.2), output="no", device="cpu")
    with pytest.raises(UnsupportedError, match="was pruned before"):
        prune_pipeline(bundle, PruneConfig(ratio=0.2), output="no", device="cpu")


def test_the_float_source_of_a_quantized_bundle_is_pruned_when_asked_for(deep_dit, tmp_path):
    source = shutil.copytree(deep_dit, tmp_path / "source")
    small = quantize_pipeline(source, QuantizeConfig(bits=8, measure="never"), output=tmp_path / "small", device="cpu")
    reporter = Reporter(quiet=True)
    config = PruneConfig(ratio=0.15, method="bksdm", measure="never")
    found = prune_pipeline(small, config, output=tmp_path / "out", from_reference=True, device="cpu", reporter=reporter)
    assert read_manifest(found).source.name == "source"
    assert "in its place" in reporter.notices[0]


def test_a_cache_plan_is_dropped_with_its_tables_and_said_so(deep_dit, tmp_path):
    fields = {"trials": 0, "rank": 0}
    plan = SearchCacheConfig(macs_ratio=0.8, steps=5, samples=1, measure="never", method="dp", settings=fields)
    cached = search_cache(deep_dit, plan, output=tmp_path / "cached", device="cpu")
    assert (cached / "transformer" / CORRECTION_NAME).is_file()
    reporter = Reporter(quiet=True)
    config = PruneConfig(ratio=0.3, method="bksdm", measure="never")
    bundle = prune_pipeline(cached, config, output=tmp_path / "out", device="cpu", reporter=reporter)
    record = read_manifest(bundle)
    assert record.components["transformer"].cache is None
    assert not (bundle / "transformer" / CORRECTION_NAME).exists()
    assert verify_bundle(bundle) == []
    assert any("cache plan of transformer is dropped" in notice for notice in record.passes[-1].notices)
    assert any("expect visibly worse" in notice for notice in record.passes[-1].notices)


def test_equal_requests_give_equal_bytes_and_a_finished_one_is_returned_at_once(
    deep_dit, inputs_of, pruned, tmp_path, monkeypatch
):
    bundle = pruned(deep_dit, ratio=0.3)
    config, calib = PruneConfig(ratio=0.3, measure="never"), inputs_of(deep_dit)
    again = prune_pipeline(deep_dit, config, calib=calib, output=tmp_path / "again", device="cpu")
    for name in read_manifest(bundle).files:
        assert (again / name).read_bytes() == (bundle / name).read_bytes()
    assert (again / "dacc_manifest.json").read_bytes() == (bundle / "dacc_manifest.json").read_bytes()
    monkeypatch.setattr("dacc.prune.run.prune_component", lambda *_: pytest.fail("it was done again"))
    assert prune_pipeline(deep_dit, config, calib=calib, output=bundle, device="cpu") == bundle


def test_scores_of_an_interrupted_run_are_taken_over(deep_dit, inputs_of, tmp_path, monkeypatch):
    from dacc.prune.teacher import Teacher

    config, calib, original = PruneConfig(ratio=0.3, measure="never"), inputs_of(deep_dit), Teacher.errors
    seen: list[Any] = []

    def counted(self: Teacher, removed: Any) -> Errors:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(removed)
        return original(self, removed)

    monkeypatch.setattr(Teacher, "errors", counted)
    with pytest.raises(KeyboardInterrupt):
        prune_pipeline(deep_dit, config, calib=calib, output=tmp_path / "out", device="cpu")
    later: list[Any] = []
    monkeypatch.setattr(Teacher, "errors", lambda self, removed: later.append(removed) or original(self, removed))
    prune_pipeline(deep_dit, config, calib=calib, output=tmp_path / "out", device="cpu")
    assert not {tuple(removed) for removed in seen} & {tuple(removed) for removed in later}


def test_without_a_set_one_is_made_on_the_fly(deep_dit, tmp_path):
    config = PruneConfig(ratio=0.15, measure="never", settings={"samples": 1, "timesteps": 2, "score": "bi"})
    bundle = prune_pipeline(deep_dit, config, output=tmp_path / "out", device="cpu")
    record = read_manifest(bundle)
    assert record.passes[-1].calibration
    assert record.components["transformer"].pruning.additivity is None
    assert len(list((tmp_path / "cache" / "calibration").iterdir())) == 1


@pytest.mark.parametrize(("better", "video"), [(True, False), (False, False), (True, True)])
def test_scores_that_do_not_add_up_are_found_anew(better, video):
    """Blocks 1 and 3 are cheap alone and dear together; what goes one by one is kept where it is better, of videos by
    content and motion whatever the outputs lose."""

    class Stub:
        is_video = video
        calls = ()

        def __init__(self, denoiser: torch.nn.Module) -> None:
            self.denoiser = denoiser

        def errors(self, removed: Any) -> Errors:
            names = {name.rpartition(".")[2] for name in removed}
            alone = {"1": 0.1, "2": 0.6, "3": 0.15, "4": 0.2}
            joint = 5.0 if {"1", "3"} <= names else 0.0
            single = sum(alone.get(name, 1.0) for name in names)
            worse = 9.0 if (video or not better) and "1" in names and len(names) > 1 and "3" not in names else 0.0
            frames = (single + joint,) * 2 if video else ()
            return Errors(single + joint + worse, *frames)

    network, reporter = toys.dit(num_layers=6).build(), Reporter(quiet=True)
    method, teacher = METHODS.load("score"), Stub(network)
    import dacc.prune.decide as module

    original, module._macs = module._macs, lambda *_: {}
    try:
        config = PruneConfig(ratio=0.3)
        found = decide(network, config, method, ScoredConfig(), teacher, {}, reporter)  # type: ignore[arg-type]
    finally:
        module._macs = original
    assert found.additivity == pytest.approx(9.3 / 0.3 if video else 1.0 if better else 5.25 / 0.25)
    assert "do not add up" in reporter.notices[0]
    assert ("content and motion" in reporter.notices[0]) is video
    wanted = (
        {"transformer_blocks.1", "transformer_blocks.4"} if better else {"transformer_blocks.1", "transformer_blocks.3"}
    )
    assert found.removal.removed == wanted


@pytest.mark.parametrize(("pipeline", "ratio"), [("deep_unet", 0.3), ("deep_dit", 0.15)])
def test_beside_a_controlnet_what_it_gives_residuals_for_stays(pipeline, ratio, request, tmp_path):
    source = shutil.copytree(request.getfixturevalue(pipeline), tmp_path / "source")
    index = json.loads((source / "model_index.json").read_text())
    (source / "model_index.json").write_text(json.dumps(index | {"control": ["diffusers", "ControlNetModel"]}))
    (source / "control").mkdir()
    config = PruneConfig(ratio=ratio, method="bksdm", measure="never")
    with pytest.raises(UnsupportedError, match="control of source gives a residual .* would change from"):
        prune_pipeline(source, config, output=tmp_path / "out", device="cpu")


def test_beside_a_controlnet_the_middle_of_a_unet_may_go(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"control": ["diffusers", "MultiControlNetModel"]}))
    source, network = SimpleNamespace(path=tmp_path, name="source"), toys.unet2d().build()
    removal = plan_removal("UNet2DModel", network.config, dict(network.named_modules()), ["mid_block"])
    refuse_other_residuals(source, "UNet2DModel", network.config, removal)  # type: ignore[arg-type]


@pytest.mark.parametrize(("ratio", "told"), [(0.05, True), (0.2, False)])
def test_it_is_told_when_much_more_goes_than_was_asked_for(ratio, told):
    network, reporter = toys.dit(num_layers=6).build(), Reporter(quiet=True)  # one block is about a seventh
    method = SimpleNamespace(select=lambda request, settings: ("transformer_blocks.2",))
    decide(network, PruneConfig(ratio=ratio), method, ScoredConfig(), None, {}, reporter)  # type: ignore[arg-type]
    assert any("units are coarse" in notice for notice in reporter.notices) is told


def test_a_choice_of_nothing_is_refused():
    network, method = toys.dit().build(), SimpleNamespace(select=lambda request, settings: ())
    with pytest.raises(UnsupportedError, match="nothing of this DiT.*--ratio"):
        decide(network, PruneConfig(), method, ScoredConfig(), None, {}, Reporter(quiet=True))  # type: ignore[arg-type]


REFUSED = {
    "a method": ({"method": "scores"}, ConfigError, "score"),
    "a field": ({"settings": {"scores": "bi"}}, ConfigError, "score"),
    "a component": ({"component": ("unet",)}, ConfigError, "no component"),
    "too much": ({"ratio": 0.9, "method": "bksdm"}, UnsupportedError, "--ratio 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_requests_are_refused_and_nothing_is_written(name, deep_dit, tmp_path):
    fields, kind, told = REFUSED[name]
    with pytest.raises(kind, match=told):
        prune_pipeline(deep_dit, PruneConfig(**fields), output=tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_set_of_another_model_is_refused(deep_dit, deep_unet, inputs_of, tmp_path):
    with pytest.raises(ModelError):
        prune_pipeline(deep_dit, PruneConfig(), calib=inputs_of(deep_unet), output=tmp_path / "out", device="cpu")


@pytest.mark.parametrize(
    ("fields", "error", "told"),
    [
        ({"output": ""}, ConfigError, "the output is empty"),
        ({"calib": "nope"}, ModelError, "nope is not a calibration"),
    ],
)
def test_an_empty_output_and_a_set_that_is_not_there_are_refused_by_every_method(deep_dit, fields, error, told):
    with pytest.raises(error, match=told):
        prune_pipeline(deep_dit, PruneConfig(method="random", ratio=0.3), device="cpu", **fields)
