import json
import shutil
from pathlib import Path

import pytest
import torch
from jsonschema import Draft202012Validator
from safetensors.torch import load_file, save_file

import dacc
from dacc import QuantizeConfig, quantize_pipeline, verify_bundle
from dacc.core.errors import ConfigError, ModelError, QualityError, UnsupportedError
from dacc.core.manifest import Manifest, read_manifest
from dacc.core.reporter import Reporter
from dacc.quant.methods import rtn
from dacc.quant.preview import preview_quantization
from dacc.runtime.request import RunRequest
from dacc.runtime.trajectory import sample

KINDS = pytest.mark.parametrize(("kind", "name"), [("unet_folder", "unet"), ("dit_folder", "transformer")])
WEIGHTS = "diffusion_pytorch_model.safetensors"
QUICK = QuantizeConfig(measure="never")


def content(folder, without=()):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in without
    }


def promised(folder):
    """Everything that equal runs must give byte for byte."""
    return content(folder, {"dacc_run.json", "README.md"})


def damaged(source, target, name, change):
    """A copy of a pipeline whose weights went through `change`."""
    shutil.copytree(source, target)
    weights = load_file(target / name / WEIGHTS)
    change(weights)
    save_file(weights, target / name / WEIGHTS)
    return target


@KINDS
@pytest.mark.parametrize("fields", [{"bits": 8}, {"bits": 4}, {"bits": 3}, {"bits": 8, "act_bits": 8}])
def test_a_pass_gives_an_intact_bundle_that_samples(kind, name, fields, request, bundle_of):
    source = request.getfixturevalue(kind)
    bundle = bundle_of(source, **fields)
    assert verify_bundle(bundle) == []
    manifest = read_manifest(bundle)
    Draft202012Validator(Manifest.model_json_schema()).validate(json.loads((bundle / "dacc_manifest.json").read_text()))
    record = manifest.components[name]
    assert record.bytes_after == (bundle / name / WEIGHTS).stat().st_size
    assert record.bytes_before == (source / name / WEIGHTS).stat().st_size
    assert record.bytes_after / record.bytes_fp32 < 0.13 + fields["bits"] / 32
    errors = [module.error for module in record.quantization.modules.values() if module.scheme]
    assert max(errors) < 2 / 2 ** fields["bits"]
    assert manifest.source.name == source.name
    assert manifest.passes[-1].config["method"] == "rtn"
    pipe = dacc.load(bundle, device="cpu")
    arguments = {"class_labels": [1]} if name == "transformer" else {"batch_size": 1}
    images = pipe(**arguments, num_inference_steps=2, output_type="np", generator=torch.manual_seed(0)).images
    assert images.shape == (1, 16, 16, 1) or images.shape == (1, 16, 16)


def test_the_effect_is_measured_and_grows_with_fewer_bits(unet_folder, bundle_of):
    effects = [
        read_manifest(bundle_of(unet_folder, bits=bits, measure="auto")).passes[-1].effect["pipeline"]
        for bits in (8, 4, 2)
    ]
    assert [effect.seeds for effect in effects] == [4, 4, 4]
    assert effects[0].relative_l2 < effects[1].relative_l2 < effects[2].relative_l2
    assert effects[0].psnr > effects[1].psnr > effects[2].psnr


@KINDS
def test_float32_that_is_not_quantized_is_stored_as_float16(kind, name, request, bundle_of):
    source = request.getfixturevalue(kind)
    before, after = load_file(source / name / WEIGHTS), load_file(bundle_of(source, bits=4) / name / WEIGHTS)
    kept = before.keys() & after.keys()
    assert any(key.endswith("bias") for key in kept)
    for key in kept:
        assert torch.equal(after[key], before[key].half())
        assert after[key].dtype == torch.float16


def test_floats_beyond_float16_are_stored_as_bfloat16(unet_folder, tmp_path):
    def change(weights):
        weights["conv_out.bias"].fill_(1e6)

    source = damaged(unet_folder, tmp_path / "source", "unet", change)
    after = load_file(quantize_pipeline(source, QUICK, output="out") / "unet" / WEIGHTS)
    assert after["conv_out.bias"].dtype == torch.bfloat16
    assert after["conv_in.bias"].dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_sources_keep_their_type(dit_folder, tmp_path, dtype):
    def change(weights):
        weights.update({key: value.to(dtype) for key, value in weights.items()})

    source = damaged(dit_folder, tmp_path / "source", "transformer", change)
    bundle = quantize_pipeline(source, QUICK, output="out")
    assert load_file(bundle / "transformer" / WEIGHTS)["proj_out_1.bias"].dtype == dtype
    assert dacc.load(bundle).transformer.dtype == torch.float32


def test_components_that_are_not_treated_are_carried_unchanged(dit_folder, bundle_of):
    bundle = bundle_of(dit_folder, bits=4)
    for part in ("vae", "scheduler"):
        assert content(bundle / part) == content(dit_folder / part)
    assert (bundle / "model_index.json").read_bytes() == (dit_folder / "model_index.json").read_bytes()


def test_an_unknown_model_is_quantized_with_a_notice(sana_folder, bundle_of):
    notices = read_manifest(bundle_of(sana_folder)).passes[-1].notices
    assert notices[0] == "SanaTransformer2DModel is not a known family; roles of its layers are guessed from names"


def test_layers_without_groups_are_named(sana_folder, bundle_of):
    """Of 24 features."""
    (notice,) = read_manifest(bundle_of(sana_folder)).passes[-1].notices[1:]
    assert notice.startswith("no group of input features divides")
    assert notice.endswith("one scale per channel: caption_projection.linear_1.")


def test_any_component_can_be_asked_for(dit_folder):
    bundle = quantize_pipeline(dit_folder, QuantizeConfig(bits=8, component=("vae",), measure="never"))
    manifest = read_manifest(bundle)
    assert list(manifest.components) == ["vae"]
    assert manifest.components["vae"].class_name == "AutoencoderKL"
    assert dacc.load(bundle).vae.decoder.mid_block.resnets[0].conv1.scheme.bits == 8


def test_two_passes_on_different_components_make_a_chain(dit_folder):
    first = quantize_pipeline(dit_folder, QUICK, output="first")
    second = quantize_pipeline(first, QuantizeConfig(bits=8, component=("vae",), measure="never"), output="second")
    manifest = read_manifest(second)
    assert [done.config["bits"] for done in manifest.passes] == [4, 8]
    assert manifest.history == [read_manifest(first).sha256()]
    assert set(manifest.components) == {"transformer", "vae"}
    assert manifest.source == read_manifest(first).source
    assert verify_bundle(second) == []


# refusals


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["down_blocks.0.resnets.0.conv1.weight", "conv_out.bias", "conv_norm_out.weight"])
def test_a_weight_that_is_no_number_is_named_and_nothing_is_put_in_place(unet_folder, tmp_path, tensor, value):
    def change(weights):
        weights[tensor].view(-1)[0] = value

    source = damaged(unet_folder, tmp_path / "source", "unet", change)
    with pytest.raises(ModelError, match=f"{tensor} holds NaN or infinity"):
        quantize_pipeline(source, QUICK, output="out")
    assert [file.name for file in tmp_path.iterdir() if not file.name.startswith(".")] == ["source"]


def test_an_error_before_the_first_layer_leaves_nothing_at_all(unet_folder, tmp_path):
    with pytest.raises(ConfigError, match="does not divide"):
        quantize_pipeline(unet_folder, QuantizeConfig(group_size=50), output="out")
    with pytest.raises(ConfigError, match="no field 'serch'"):
        quantize_pipeline(unet_folder, QuantizeConfig(settings={"serch": "mse"}), output="out")
    with pytest.raises(ConfigError, match="no quantization method 'rtm'"):
        quantize_pipeline(unet_folder, QuantizeConfig(method="rtm"), output="out")
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_model_are_named(unet_folder, tmp_path):
    def change(weights):
        weights["time_embedding.linear_1.weight"] = torch.zeros(3, 3)
        del weights["mid_block.resnets.0.conv1.weight"]

    source = damaged(unet_folder, tmp_path / "source", "unet", change)
    with pytest.raises(
        ModelError, match=r"time_embedding.linear_1.weight has shape \(3, 3\); the config needs \(64, 16\)"
    ):
        quantize_pipeline(source, QUICK, output="out")
    with pytest.raises(ModelError, match=r"mid_block.resnets.0.conv1.weight is missing"):
        quantize_pipeline(source, QuantizeConfig(exclude=("time*",)), output="out")


def test_a_quantized_component_is_not_quantized_again(unet_folder, bundle_of, tmp_path):
    bundle = bundle_of(unet_folder, bits=4)
    with pytest.raises(UnsupportedError, match="unet of .* is already quantized by dacc") as caught:
        quantize_pipeline(bundle, QuantizeConfig(bits=3), output="out")
    assert unet_folder.name in caught.value.mend
    shutil.copytree(bundle, tmp_path / "bare", ignore=shutil.ignore_patterns("dacc_*"))
    with pytest.raises(UnsupportedError, match="already quantized by dacc"):
        quantize_pipeline(tmp_path / "bare", QuantizeConfig(bits=3), output="out")


# repeating, resuming


def test_a_second_call_returns_at_once_and_touches_nothing(unet_folder, capsys):
    first = quantize_pipeline(unet_folder, QUICK)
    before = {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in first.rglob("*")}
    assert quantize_pipeline(unet_folder, QUICK, reporter=Reporter(strict=True)) == first
    assert f"{first} already holds this result" in capsys.readouterr().err
    assert {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in first.rglob("*")} == before


def test_another_config_does_not_replace_a_result_unasked(unet_folder):
    first = quantize_pipeline(unet_folder, QUICK, output="out")
    before = content(first)
    with pytest.raises(ConfigError, match="exists") as caught:
        quantize_pipeline(unet_folder, QuantizeConfig(bits=8, measure="never"), output="out")
    assert "--overwrite" in caught.value.mend
    assert content(first) == before
    quantize_pipeline(unet_folder, QuantizeConfig(bits=8, measure="never"), output="out", overwrite=True)
    assert read_manifest(first).passes[-1].config["bits"] == 8


@KINDS
def test_two_runs_give_the_same_bytes(kind, name, request):
    source = request.getfixturevalue(kind)
    first = quantize_pipeline(source, QuantizeConfig(bits=4), output="first")
    second = quantize_pipeline(source, QuantizeConfig(bits=4), output="second")
    assert promised(first) == promised(second)


def interrupt_after(layers, monkeypatch):
    """Ctrl-C in the middle; returns the list of layers that were quantized, which goes on growing."""
    quantized, done = rtn.quantize, []

    def counting(weight, scheme, config):
        if len(done) == layers:
            raise KeyboardInterrupt
        done.append(tuple(weight.shape))
        return quantized(weight, scheme, config)

    monkeypatch.setattr(rtn, "quantize", counting)
    return done


@KINDS
@pytest.mark.parametrize("resume", [True, False])
def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(kind, name, resume, request, monkeypatch, tmp_path):
    source = request.getfixturevalue(kind)
    whole = quantize_pipeline(source, QuantizeConfig(bits=3), output="whole")
    with monkeypatch.context() as patch:
        done = interrupt_after(5, patch)
        with pytest.raises(KeyboardInterrupt):
            quantize_pipeline(source, QuantizeConfig(bits=3), output="again")
    assert not (tmp_path / "again").exists()
    with monkeypatch.context() as patch:
        rest = interrupt_after(None, patch)
        again = quantize_pipeline(source, QuantizeConfig(bits=3), output="again", resume=resume)
    layers = sum(1 for record in read_manifest(whole).components[name].quantization.modules.values() if record.scheme)
    assert len(done) == 5
    assert len(rest) == (layers - 5 if resume else layers)
    assert promised(again) == promised(whole)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again", "whole"]


def test_a_run_with_other_threads_neither_mixes_with_an_interrupted_one_nor_is_another_result(
    unet_folder, monkeypatch, tmp_path
):
    with monkeypatch.context() as patch:
        interrupt_after(5, patch)
        patch.setattr(torch, "get_num_threads", lambda: 8)
        with pytest.raises(KeyboardInterrupt):
            quantize_pipeline(unet_folder, QUICK, output="out")
    with monkeypatch.context() as patch:
        done = interrupt_after(None, patch)
        bundle = quantize_pipeline(unet_folder, QUICK, output="out")
    modules = read_manifest(bundle).components["unet"].quantization.modules
    assert len(done) == sum(1 for record in modules.values() if record.scheme)
    with monkeypatch.context() as patch:
        interrupt_after(0, patch)
        patch.setattr(torch, "get_num_threads", lambda: 8)
        assert quantize_pipeline(unet_folder, QUICK, output="out") == bundle


# floors


@pytest.mark.parametrize("keep", [False, True])
def test_a_missed_floor_puts_nothing_in_place(unet_folder, tmp_path, keep):
    with pytest.raises(QualityError, match=r"psnr is .*; --require asks for >= 90") as caught:
        quantize_pipeline(unet_folder, QuantizeConfig(bits=2), output="out", require=("psnr>=90",), keep_failed=keep)
    assert caught.value.exit_code == 6
    assert [file.name for file in tmp_path.iterdir()] == (["out.failed"] if keep else [])
    if keep:
        assert dacc.load(tmp_path / "out.failed").unet.conv_in is not None


def test_a_reached_floor_changes_no_byte(unet_folder, bundle_of):
    kept = quantize_pipeline(unet_folder, QuantizeConfig(bits=8), output="out", require=("psnr>=5", "relative_l2<=0.5"))
    assert promised(kept) == promised(bundle_of(unet_folder, bits=8, measure="auto"))


def test_a_floor_also_holds_for_a_result_from_before(unet_folder):
    made = quantize_pipeline(unet_folder, QuantizeConfig(bits=2), output="out")
    before = content(made)
    assert quantize_pipeline(unet_folder, QuantizeConfig(bits=2), output="out", require=("psnr>=1",)) == made
    with pytest.raises(QualityError, match=r"psnr is .*; --require asks for >= 90"):
        quantize_pipeline(unet_folder, QuantizeConfig(bits=2), output="out", require=("psnr>=90",))
    assert content(made) == before


def test_a_floor_without_a_measurement_is_missed(unet_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("dacc.runtime.measure.COPIES", 1e12)  # no machine has so much memory
    with pytest.raises(QualityError, match="psnr was not measured") as caught:
        quantize_pipeline(unet_folder, QuantizeConfig(bits=2), output="out", require=("psnr>=1",))
    assert "bits" not in caught.value.mend
    assert list(tmp_path.iterdir()) == []


def test_a_floor_that_nothing_will_measure_is_refused_before_anything_is_read():
    with pytest.raises(ConfigError, match="Leave --measure never out"):
        quantize_pipeline("nowhere", QUICK, require=("psnr>=1",))


@pytest.mark.parametrize("output", ["", Path("")])
def test_an_empty_output_is_refused(unet_folder, tmp_path, output):
    with pytest.raises(ConfigError, match="the output"):
        quantize_pipeline(unet_folder, QUICK, output=output, overwrite=True)
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_set_that_is_not_there_is_refused_by_methods_that_need_none_too(unet_folder, tmp_path):
    with pytest.raises(ModelError, match="nope is not a calibration set"):
        quantize_pipeline(unet_folder, QUICK, calib="nope")
    assert list(tmp_path.iterdir()) == []


def test_strict_refuses_to_guess(sana_folder, tmp_path):
    with pytest.raises(ConfigError, match="not a known family"):
        quantize_pipeline(sana_folder, QUICK, output="out", reporter=Reporter(quiet=True, strict=True))
    assert list(tmp_path.iterdir()) == []


def test_linears_that_keep_one_activation_scale_per_token_are_a_notice(dit_folder):
    reporter, name = Reporter(quiet=True), "transformer_blocks.0.ff.net.2"
    fields = {"bits": 4, "act_bits": 4, "act_mode": "per-group", "group_size": 48, "include": (name,)}
    config = QuantizeConfig(layer_bits=((name, 8),), **fields)
    preview_quantization(dit_folder, config, reporter=reporter)
    assert reporter.notices == [
        f"no group of input features divides these linears; their activations have one scale per token: {name}."
    ]


def test_what_executes_4_bit_floats_and_what_stays_integer_is_said(unet_folder, dit_folder, bundle_of):
    for folder, component, integers in ((unet_folder, "unet", True), (dit_folder, "transformer", False)):
        manifest = read_manifest(bundle_of(folder, format="nvfp4"))
        notices = manifest.passes[-1].notices
        assert "no CPU multiplies them as they are, and dacc has no kernel" in notices[0]
        assert len(notices) == 1 + integers
        assert not integers or "these layers have 4-bit integers: " in notices[1]
        modules = manifest.components[component].quantization.modules.values()
        assert any(module.scheme == "w4-g16-nvfp4" for module in modules)


def test_the_default_output_names_the_format(dit_folder):
    assert (
        quantize_pipeline(dit_folder, QuantizeConfig(format="nvfp4", measure="never")).name
        == "tiny-dit-w4a16-nvfp4-rtn"
    )


# elsewhere


LATENTS = """
import sys, torch, dacc
from dacc.runtime.request import RunRequest
from dacc.runtime.trajectory import sample
for bundle, result in (sys.argv[1:3], sys.argv[3:]):
    samples = sample(dacc.load(bundle, device="cpu"), RunRequest(seeds=(1, 2), num_inference_steps=3))
    torch.save((samples.latents, samples.images), result)
"""


def test_a_fresh_process_samples_bit_for_bit_the_same(unet_folder, dit_folder, bundle_of, run_python):
    bundles = {bundle_of(source, bits=4): f"{source.name}.pt" for source in (unet_folder, dit_folder)}
    run_python(LATENTS, *[word for pair in bundles.items() for word in pair])
    for bundle, result in bundles.items():
        latents, images = torch.load(result)
        here = sample(dacc.load(bundle, device="cpu"), RunRequest(seeds=(1, 2), num_inference_steps=3))
        assert torch.equal(here.latents, latents)
        assert torch.equal(here.images, images)
