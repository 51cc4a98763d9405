"""Where the calibration set of a quantization comes from, and that it is the right one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from dacc import (
    CalibrateConfig,
    PruneConfig,
    QuantizeConfig,
    calibrate_pipeline,
    load,
    prune_pipeline,
    quantize_pipeline,
    verify_bundle,
)
from dacc.calibrate.store import _Shard, open_calibration
from dacc.core.calibration import read_calibration
from dacc.core.errors import BundleError, ConfigError, ModelError
from dacc.core.lock import WriterLock, lock_of
from dacc.core.manifest import read_manifest
from dacc.core.reporter import Reporter, silent
from dacc.core.source import resolve_source
from dacc.quant.api import prepare
from dacc.runtime.trajectory import DenoiserCall

SMALL = CalibrateConfig(samples=2, steps=2, timesteps=2, batch_size=2)
GPTQ = QuantizeConfig(bits=4, method="gptq", measure="never")


@pytest.fixture
def calibration(dit_folder: Path, tmp_path: Path) -> Path:
    return calibrate_pipeline(dit_folder, SMALL, output=tmp_path / "set")


def files_of(bundle: Path) -> dict[str, bytes]:
    manifest = read_manifest(bundle)
    assert manifest is not None
    return {name: (bundle / name).read_bytes() for name in manifest.files}


def use_small_sets(monkeypatch: pytest.MonkeyPatch, small: CalibrateConfig) -> None:
    monkeypatch.setattr(
        "dacc.quant.config.CalibrateConfig",
        lambda **fields: small.model_copy(update={**fields, "samples": small.samples}),
    )


def test_a_set_that_cannot_be_made_on_the_fly_is_left_to_the_command_with_its_options(
    unet_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("dacc.quant.config.ON_THE_FLY_GB", 1e-6)
    with pytest.raises(ConfigError, match="a batch of 8 samples takes") as caught:
        quantize_pipeline(unet_folder, GPTQ, output=tmp_path / "out")
    made, why = caught.value.mend.split(" For that command: ")
    assert made == f"Make a set with dacc calibrate {unet_folder} -o inputs, and give --calib inputs."
    assert "--budget-gb" in why


def test_a_given_set_is_used_and_named_in_the_manifest(dit_folder: Path, calibration: Path, tmp_path: Path) -> None:
    bundle = quantize_pipeline(dit_folder, GPTQ, calib=calibration, output=tmp_path / "small")
    manifest, record = read_manifest(bundle), read_calibration(calibration)
    assert manifest is not None
    assert record is not None
    assert manifest.passes[-1].calibration == record.id
    modules = manifest.components["transformer"].quantization.modules
    errors = [module.output_error for module in modules.values() if module.output_error is not None]
    assert len(errors) > 5
    assert max(errors) < 0.5
    verify_bundle(bundle)


def test_a_set_given_as_source_means_its_pipeline_and_itself(
    dit_folder: Path, calibration: Path, tmp_path: Path
) -> None:
    source = resolve_source(str(calibration), reporter=silent())
    assert source.calibration == calibration
    found = quantize_pipeline(source, GPTQ, output=tmp_path / "found")
    given = quantize_pipeline(dit_folder, GPTQ, calib=calibration, output=tmp_path / "given")
    assert files_of(found) == files_of(given)


def test_without_a_set_one_is_made_once_and_kept(unet_folder: Path, tmp_path: Path, monkeypatch) -> None:
    use_small_sets(monkeypatch, SMALL)
    first, second = Reporter(quiet=True), Reporter(quiet=True)
    said: list[str] = []
    monkeypatch.setattr(second, "say", said.append)
    one = quantize_pipeline(unet_folder, GPTQ, output=tmp_path / "one", reporter=first)
    (kept,) = (tmp_path / "cache" / "calibration").iterdir()
    written = (kept / "dacc_calibration.json").stat().st_mtime_ns
    two = quantize_pipeline(unet_folder, GPTQ, output=tmp_path / "two", reporter=second)
    assert (kept / "dacc_calibration.json").stat().st_mtime_ns == written
    assert files_of(one) == files_of(two)
    assert not [line for line in said if "no --calib given" in line]


def test_a_set_that_another_run_is_making_is_waited_for(unet_folder: Path, tmp_path: Path, monkeypatch) -> None:
    use_small_sets(monkeypatch, SMALL)
    one = quantize_pipeline(unet_folder, GPTQ, output=tmp_path / "one")
    (kept,) = (tmp_path / "cache" / "calibration").iterdir()
    aside = kept.rename(tmp_path / "aside")
    lock, reporter, said = WriterLock(lock_of(kept)), Reporter(quiet=True), list[str]()

    def say(text: str) -> None:
        said.append(text)
        if "waiting" in text:  # the other run comes to its end
            aside.rename(kept)
            lock.release()

    monkeypatch.setattr(reporter, "say", say)
    lock.acquire()
    two = quantize_pipeline(unet_folder, GPTQ, output=tmp_path / "two", reporter=reporter)
    assert any(f"another run is making {kept.name}; waiting for it" in line for line in said)
    assert files_of(two) == files_of(one)


def test_a_damaged_set_in_the_cache_is_made_anew(unet_folder: Path, tmp_path: Path, monkeypatch) -> None:
    use_small_sets(monkeypatch, SMALL)
    one = quantize_pipeline(unet_folder, GPTQ, output=tmp_path / "one")
    (shard,) = (tmp_path / "cache" / "calibration").rglob("calls-*.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert files_of(quantize_pipeline(unet_folder, GPTQ, output=tmp_path / "two")) == files_of(one)
    assert shard.read_bytes() == whole


def test_what_needs_no_set_is_known_without_importing_it(run_python) -> None:
    code = """
import sys
from dacc.quant.config import QuantizeConfig
config = QuantizeConfig(method="ptq4dm", act_bits=8).resolved()
assert config.needs_calibration and config.act_mode == "static"
assert "torch" not in sys.modules and "dacc.quant.methods.ptq4dm" not in sys.modules
"""
    run_python(code)


def test_another_scheduler_means_another_set_and_another_result(unet_folder: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(unet_folder, changed)
    config = changed / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"clip_sample": false', '"clip_sample": true'))
    assert config.read_text() != (unet_folder / "scheduler" / "scheduler_config.json").read_text()
    keys = {prepare(folder, GPTQ, silent()).run_key for folder in (unet_folder, changed)}
    assert len(keys) == 2


def test_a_set_made_earlier_brings_its_notices_as_one_made_now(sd_folder: Path, tmp_path: Path, monkeypatch) -> None:
    small = SMALL.model_copy(update={"height": 32, "width": 32})
    use_small_sets(monkeypatch, small)
    one, two = (quantize_pipeline(sd_folder, GPTQ, output=tmp_path / name) for name in ("one", "two"))
    manifests = [read_manifest(bundle) for bundle in (one, two)]
    assert all(manifest is not None for manifest in manifests)
    first, second = (manifest.passes[-1].notices for manifest in manifests if manifest)
    assert first == second
    assert [notice for notice in first if "no prompts were given" in notice]


@pytest.mark.parametrize(
    ("fields", "advice"),
    [
        ({"settings": {"dampng": 1}}, "Did you mean damping"),
        ({"exclude": ("nothing.*",)}, "matches no layer"),
        ({"group_size": 7}, "does not divide"),
    ],
    ids=["field", "glob", "group"],
)
def test_what_cannot_be_is_refused_before_a_set_is_made(
    dit_folder: Path, tmp_path: Path, monkeypatch, fields, advice
) -> None:
    monkeypatch.setattr("dacc.calibrate.inputs.calibrate_pipeline", lambda *_, **__: pytest.fail("it was calibrated"))
    with pytest.raises(ConfigError, match=advice):
        quantize_pipeline(dit_folder, GPTQ.model_copy(update=fields), output=tmp_path / "out")


def test_on_a_device_without_float64_it_says_that_the_layers_are_treated_on_the_cpu(
    dit_folder: Path, calibration: Path, tmp_path: Path, monkeypatch
) -> None:
    reporter, said = Reporter(quiet=True), []
    monkeypatch.setattr(reporter, "say", said.append)
    for place in ("dacc.quant.driver.pick_device", "dacc.runtime.load.pick_device"):
        monkeypatch.setattr(place, lambda _: torch.device("mps"))
    monkeypatch.setattr("dacc.quant.outcome.target_of", lambda *_: None)  # it would look for the device
    quantize_pipeline(dit_folder, GPTQ, calib=calibration, output=tmp_path / "out", device="mps", reporter=reporter)
    assert [line for line in said if "gptq treats the layers on the CPU: mps has no float64" in line]


def test_only_the_calls_that_fit_are_read(dit_folder: Path, tmp_path: Path, monkeypatch) -> None:
    calib = calibrate_pipeline(dit_folder, SMALL.model_copy(update={"batch_size": 1}), output=tmp_path / "set")
    read, call, reporter = [], _Shard.call, Reporter(quiet=True)

    def watched(shard: _Shard, place: int) -> DenoiserCall:
        read.append((shard.number, place))
        return call(shard, place)

    monkeypatch.setattr(_Shard, "call", watched)
    monkeypatch.setattr("dacc.quant.held.held_bytes", lambda *_, **__: 1_000_000)
    config = GPTQ.model_copy(update={"cache_gb": 0.0025})
    quantize_pipeline(dit_folder, config, calib=calib, output=tmp_path / "out", device="cpu", reporter=reporter)
    assert [notice for notice in reporter.notices if notice.startswith("2 of the ")]
    assert 2 <= len(set(read)) <= 3 < len(open_calibration(calib))  # these two, and the first one to measure


def test_the_set_of_another_model_is_refused_before_anything_is_written(
    unet_folder: Path, calibration: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError):
        quantize_pipeline(unet_folder, GPTQ, calib=calibration, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_set_is_refused(dit_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a calibration set"):
        quantize_pipeline(dit_folder, GPTQ, calib=tmp_path, output=tmp_path / "out")


def test_a_method_that_needs_none_says_that_the_set_is_not_used(
    dit_folder: Path, calibration: Path, tmp_path: Path
) -> None:
    reporter = Reporter(quiet=True)
    config = GPTQ.model_copy(update={"method": "rtn"})
    bundle = quantize_pipeline(dit_folder, config, calib=calibration, output=tmp_path / "plain", reporter=reporter)
    assert [notice for notice in reporter.notices if "needs no calibration set" in notice]
    manifest = read_manifest(bundle)
    assert manifest is not None
    assert manifest.passes[-1].calibration is None


def test_another_set_gives_another_result_in_place_of_the_old_one(
    dit_folder: Path, calibration: Path, tmp_path: Path
) -> None:
    other = calibrate_pipeline(dit_folder, SMALL.model_copy(update={"seed": 1}), output=tmp_path / "other")
    one = quantize_pipeline(dit_folder, GPTQ, calib=calibration, output=tmp_path / "one")
    two = quantize_pipeline(dit_folder, GPTQ, calib=other, output=tmp_path / "two")
    assert files_of(one) != files_of(two)


STATIC = QuantizeConfig(bits=8, act_bits=8, act_mode="static", measure="never")
FIXED = pytest.mark.parametrize(
    "config",
    [STATIC, STATIC.model_copy(update={"act_mode": "per-step"}), STATIC.model_copy(update={"method": "ptq4dm"})],
    ids=["static", "per-step", "ptq4dm"],
)


@FIXED
def test_fixed_scales_need_the_set_of_this_very_model(
    config: QuantizeConfig, unet_folder: Path, dit_folder: Path, calibration_of, tmp_path: Path
) -> None:
    with pytest.raises(ModelError) as caught:
        quantize_pipeline(unet_folder, config, calib=calibration_of(dit_folder), output=tmp_path / "out")
    assert caught.value.mend
    assert not (tmp_path / "out").exists()


@FIXED
def test_a_set_that_was_cut_short_is_refused(
    config: QuantizeConfig, unet_folder: Path, calibration_of, tmp_path: Path
) -> None:
    damaged = shutil.copytree(calibration_of(unet_folder), tmp_path / "set")
    shard = next(damaged.rglob("calls-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(BundleError, match=shard.name) as caught:
        quantize_pipeline(unet_folder, config, calib=damaged, output=tmp_path / "out")
    assert "dacc calibrate" in caught.value.mend
    assert not (tmp_path / "out").exists()


@FIXED
def test_fixed_scales_of_plain_rounding_are_found_on_the_set(
    config: QuantizeConfig, unet_folder: Path, calibration_of, tmp_path: Path
) -> None:
    bundle = quantize_pipeline(unet_folder, config, calib=calibration_of(unet_folder), output=tmp_path / "out")
    manifest = read_manifest(bundle)
    assert manifest is not None
    record = manifest.components["unet"].quantization
    fixed = [scheme for scheme in record.schemes.values() if scheme.act_bits == 8]
    assert {scheme.act_mode for scheme in fixed} == {config.act_mode}
    assert (record.steps is not None) == (config.act_mode == "per-step")
    unet = load(bundle, device="cpu").unet
    rows = {layer.act_scale.shape for layer in unet.modules() if getattr(layer, "act_scale", None) is not None}
    assert rows == {(4, 1) if config.act_mode == "per-step" else (1, 1)}


def test_a_set_of_another_type_serves_the_float_network(dit_folder: Path, tmp_path: Path) -> None:
    recipe = CalibrateConfig(samples=4, steps=3, batch_size=2)
    half = calibrate_pipeline(dit_folder, recipe, output=tmp_path / "half", dtype="bfloat16")
    assert {call.args[0].dtype for call in open_calibration(half)} == {torch.bfloat16}
    config = QuantizeConfig(bits=4, act_bits=8, method="gptq", measure="never")
    bundle = quantize_pipeline(dit_folder, config, calib=half, output=tmp_path / "out", device="cpu")
    layers = read_manifest(bundle).components["transformer"].quantization.modules.values()
    assert 0 < max(layer.output_error or 0 for layer in layers) < 0.5


def test_a_set_of_before_an_earlier_pass_serves_with_a_notice(dit_folder: Path, calibration_of, tmp_path: Path) -> None:
    pruned = prune_pipeline(
        dit_folder, PruneConfig(ratio=0.2, method="bksdm", measure="never"), output=tmp_path / "pruned", device="cpu"
    )
    reporter, config = silent(), QuantizeConfig(bits=4, method="gptq", measure="never")
    given = {"calib": calibration_of(dit_folder), "output": tmp_path / "out", "device": "cpu"}
    quantize_pipeline(pruned, config, **given, reporter=reporter)
    assert any("before earlier passes changed transformer" in notice for notice in reporter.notices)
