"""Whatever cannot be done is refused with the right exit code, one message with advice, and nothing touched."""

from __future__ import annotations

import functools
import json
import os
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline
from safetensors.torch import load_file, save_file

WEIGHTS = "diffusion_pytorch_model.safetensors"


def refuse(dacc, unchanged, code, *arguments):
    """Run what must be refused; its message."""
    unchanged()
    ran = dacc(*arguments)
    assert ran.code == code, ran.err
    assert ran.out == ""
    unchanged()
    return ran.error


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


# usage, exit code 2


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (["--bits", "0"], "greater than or equal to 2"),
        (["--bits", "9"], "less than or equal to 8"),
        (["--bits", "four"], "valid integer"),
        (["--act-bits", "9"], "4 to 8, or 16"),
        (["--act-bits", "many"], "--act-bits 8"),
        (["--attention-bits", "3"], "4 to 8, or 16"),
        (["--attention-bits", "many"], "--attention-bits 8"),
        (["--act-mode", "never"], "'static' or 'per-step'"),
        (["--method", "rtnn"], "Did you mean rtn?"),
        (["--method", "magic"], "Known: "),
        (["--group-size", "48"], "--group-size auto"),
        (["--group-size", "0"], "at least one value"),
        (["--group-size", "wide"], "'auto' or 'channel'"),
        (["--act-bits", "8", "--asymmetric"], "drop --asymmetric"),
        (["--act-bits", "8", "--bits", "8", "--group-size", "8"], "drop --group-size"),
        (["--set", "serch=mse"], "Did you mean search?"),
        (["--set", "search=best"], "'minmax' or 'mse'"),
        (["--set", "search"], "--set search=mse"),
        (["--set", "search=mse", "--set", "search=mse"], "each field once"),
        (["--layer-bits", "conv_in"], "--layer-bits '*.ff.*=8'"),
        (["--layer-bits", "conv_in=9"], "2 to 8, or 16"),
        (["--act-bits", "4", "--layer-act-bits", "conv_in"], "--layer-act-bits '*.ff.*=8'"),
        (["--layer-act-bits", "*.conv1=8"], "need --act-bits"),
        (["--component", "unett"], "Did you mean unet?"),
        (["--component", "vae"], "Known: "),
        (["--include", "midblock.*"], "matches no layer"),
        (["--exclude", "*.nothing"], "matches no layer"),
        (["--require", "psnr"], "psnr>=25"),
        (["--require", "beauty>=1"], "psnr>=25"),
        (["--device", "abacus"], "--device cpu"),
        (["--measure", "sometimes"], "'auto' or 'never'"),
        (["--cache-gb", "inf"], "finite number"),
        (["--seed", "-1"], "dacc quantize --help"),
        (["--seed", "x"], "dacc quantize --help"),
        (["--bts", "4"], "--bits"),
        (["--threads", "0"], "dacc quantize --help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_quantize_refuses_a_wrong_option(dacc, pipeline, unchanged, options, advice):
    assert advice in refuse(dacc, unchanged, 2, "quantize", pipeline, *options)


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["generate", "--dtype", "int3"], "Known: "),
        (["generate", "--prefer", "luck"], "Known: memory, speed"),
        (["generate", "--num", "0"], "dacc generate --help"),
        (["generate", "--class", "3"], "Leave"),
        (["generate", "--height", "0"], "dacc generate --help"),
        (["generate", "--height", "16"], "does not take height"),
        (["generate", "--num-frames", "8"], "does not take num_frames"),
        (["generate", "--negative-prompt", "blurry"], "does not take negative_prompt"),
        (["generate", "--prompts", "nowhere.txt"], "Give a text file"),
        (["generate", "--prompts", "pipe"], "Give a text file"),
        (["generate", "--prompts", os.devnull], "Write one on each line"),
        (["evaluate", "--prompts", sys.executable], "Save it as UTF-8"),
        (["evaluate", "--metrics", "psnr_sim"], "Did you mean psnr_ssim?"),
        (["evaluate", "--dtype", "floaty"], "Did you mean float32"),
        (["evaluate", "--prefer", "sped"], "Did you mean speed?"),
        (["evaluate", "--num", "none"], "dacc evaluate --help"),
        (["inspect", "--device", "abacus"], "--device cpu"),
        (["calibrate", "--budget-gb", "nan"], "finite number"),
        (["calibrate", "--guidance-scale", "inf"], "finite number"),
        (["search-cache", "--speedup", "inf"], "finite number"),
        (["prune", "--ratio", "nan"], "less than 1"),
        (["generate", "--guidance-scale", "nan"], "finite number"),
        (["evaluate", "--guidance-scale", "inf"], "finite number"),
        (["generate", "--device", "abacus"], "--device cpu"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_other_commands_refuse_a_wrong_option(dacc, pipeline, unchanged, arguments, advice):
    name, *options = arguments
    assert advice in refuse(dacc, unchanged, 2, name, pipeline, *options)


@pytest.mark.parametrize("arguments", [["quantise"], ["zoo", "lst"], ["zoo", "copy"], ["--loud"]])
def test_an_unknown_command_or_option_points_to_the_help(dacc, unchanged, arguments):
    assert "--help" in refuse(dacc, unchanged, 2, *arguments)


# outputs, exit code 2


def test_an_output_that_exists_is_kept(dacc, pipeline, unchanged, tmp_path):
    shutil.copytree(pipeline, tmp_path / "out")
    assert "--overwrite" in refuse(dacc, unchanged, 2, "quantize", pipeline, "-o", tmp_path / "out")


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_a_file_in_place_of_the_output_is_kept(dacc, pipeline, unchanged, tmp_path, options):
    (tmp_path / "out").write_text("mine")
    message = refuse(dacc, unchanged, 2, "quantize", pipeline, "-o", tmp_path / "out", *options)
    assert "is a file" in message


@pytest.mark.parametrize("written", ["", ".", "../here"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize", "zoo:digits-dit", "--bits", 8, "--measure", "never"],
        ["export", "zoo:digits-dit"],
        ["generate", "zoo:digits-dit", "--num", 1, "--steps", 1],
        ["calibrate", "zoo:digits-dit", "--samples", 1, "--steps", 1],
        ["zoo", "copy", "digits-dit"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_the_current_folder_is_not_deleted(dacc, pipeline, unchanged, monkeypatch, tmp_path, arguments, written):
    here = pipeline.rename(tmp_path / "here")
    (here / "thesis.txt").write_text("mine")
    monkeypatch.chdir(here)
    assert refuse(dacc, unchanged, 2, *arguments, "--overwrite", "-o", written)


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize", "--output="],
        ["prune", "--calib", ""],
        ["evaluate", "--output", ""],
        ["evaluate", "--reference", ""],
        ["evaluate", "-r", ""],
        ["generate", "--prompts", ""],
        ["calibrate", "--images", ""],
        ["search-cache", "--cost-profile", ""],
        ["quantize", "--fuse-lora", "style.safetensors", "--fuse-lora", ""],
    ],
    ids=" ".join,
)
def test_an_option_without_a_value_is_not_the_default(dacc, pipeline, unchanged, arguments):
    name, *options = arguments
    message = refuse(dacc, unchanged, 2, name, pipeline, *options)
    assert "is empty. Was it $(a command that failed)" in message


def test_the_root_of_the_disk_is_no_output(dacc, pipeline, unchanged):
    refuse(dacc, unchanged, 2, "zoo", "copy", "digits-dit", "-o", "/", "--overwrite")


def test_a_damaged_result_is_not_returned(dacc, pipeline, tmp_path):
    ran = dacc("quantize", pipeline, "-o", "out", "--measure", "never")
    file = tmp_path / "out/unet" / WEIGHTS
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    again = dacc("quantize", pipeline, "-o", "out", "--measure", "never")
    assert (ran.code, again.code, again.out) == (0, 2, "")
    assert "damaged: unet" in again.error
    assert "--overwrite" in again.error
    mended = dacc("quantize", pipeline, "-o", "out", "--measure", "never", "--overwrite")
    assert (mended.code, file.read_bytes()) == (0, content)


def test_overwrite_deletes_only_pipelines(dacc, pipeline, unchanged, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("mine")
    message = refuse(dacc, unchanged, 2, "quantize", pipeline, "-o", tmp_path / "thesis", "--overwrite")
    assert "deletes only pipelines" in message


@pytest.mark.parametrize("inside", ["", "unet", "new/deep"])
def test_the_output_may_not_lie_in_the_source(dacc, pipeline, unchanged, inside):
    message = refuse(dacc, unchanged, 2, "quantize", pipeline, "-o", pipeline / inside, "--overwrite")
    assert "Choose another --output" in message


def test_the_output_may_not_hold_the_source(dacc, pipeline, unchanged, tmp_path):
    message = refuse(dacc, unchanged, 2, "quantize", pipeline, "-o", tmp_path, "--overwrite")
    assert "Choose another --output" in message


def test_generate_keeps_an_existing_output(dacc, pipeline, unchanged, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/holiday.jpg").write_text("mine")
    assert "--overwrite" in refuse(dacc, unchanged, 2, "generate", pipeline, "-o", tmp_path / "out")
    assert "holiday.jpg" in refuse(dacc, unchanged, 2, "generate", pipeline, "-o", tmp_path / "out", "--overwrite")


def test_generate_keeps_a_link_and_what_it_leads_to(dacc, pipeline, unchanged, tmp_path):
    (tmp_path / "album").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "album")
    assert "is a file or a link" in refuse(
        dacc, unchanged, 2, "generate", pipeline, "-o", tmp_path / "out", "--overwrite"
    )


def test_evaluate_keeps_an_earlier_report(dacc, pipeline, unchanged, tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report/evaluation.json").write_text("{}")
    assert "--overwrite" in refuse(dacc, unchanged, 2, "evaluate", pipeline, "-o", tmp_path / "report")
    assert "is a file" in refuse(dacc, unchanged, 2, "evaluate", pipeline, "-o", tmp_path / "report/evaluation.json")


def test_zoo_copy_keeps_an_existing_output(dacc, unchanged, tmp_path):
    (tmp_path / "digits-unet").mkdir()
    assert "--overwrite" in refuse(dacc, unchanged, 2, "zoo", "copy", "digits-unet")


# input, exit code 3


@pytest.mark.parametrize(
    ("source", "advice"),
    [
        ("nowhere", "dacc zoo list"),
        ("/no/where/at/all", "dacc zoo list"),
        ("", "the SOURCE is empty"),
        ("digits-unet", "Did you mean zoo:digits-unet?"),
        ("zoo:digits-unte", "Did you mean digits-unet"),
        ("owner/name", "HF_HUB_OFFLINE"),
        ("owner/name@main", "HF_HUB_OFFLINE"),
    ],
)
@pytest.mark.parametrize("name", ["quantize", "generate", "evaluate", "inspect", "verify"])
def test_a_source_that_is_not_there(dacc, unchanged, name, source, advice):
    assert advice in refuse(dacc, unchanged, 3, name, source)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_calibration_set_that_is_not_there(dacc, pipeline, unchanged, method):
    message = refuse(dacc, unchanged, 3, "quantize", pipeline, "--method", method, "--calib", "nope")
    assert "nope is not a calibration set. Make one with dacc calibrate" in message


def test_zoo_copy_of_an_unknown_name(dacc, unchanged):
    assert "Did you mean digits-dit" in refuse(dacc, unchanged, 3, "zoo", "copy", "digits-dti")


@pytest.mark.parametrize("name", ["quantize", "generate", "evaluate", "inspect", "verify", "zoo copy"])
def test_a_zoo_pipeline_that_is_not_installed(dacc, unchanged, tmp_path, monkeypatch, name):
    entry = {"pipeline": "FluxPipeline", "description": "", "num_inference_steps": 4}
    (tmp_path / "index.json").write_text(json.dumps({"far-away": entry}))
    monkeypatch.setenv("DACC_ZOO", str(tmp_path))
    message = refuse(dacc, unchanged, 3, *name.split(), "zoo:far-away")
    assert "not part of the installed package" in message
    assert "dacc zoo add FOLDER" in message


def test_zoo_add_of_what_is_no_zoo(dacc, pipeline, unchanged):
    assert "a checkout of dacc's repository" in refuse(dacc, unchanged, 3, "zoo", "add", pipeline)


def test_a_folder_that_is_no_pipeline(dacc, unchanged, tmp_path):
    (tmp_path / "photos").mkdir()
    assert "model_index.json" in refuse(dacc, unchanged, 3, "quantize", tmp_path / "photos")


def test_a_component_in_place_of_a_pipeline(dacc, pipeline, unchanged):
    assert f"Give {pipeline}" in refuse(dacc, unchanged, 3, "quantize", pipeline / "unet")


def test_a_single_file_checkpoint(dacc, pipeline, unchanged):
    assert "from_single_file" in refuse(dacc, unchanged, 3, "quantize", pipeline / "unet" / WEIGHTS)


def test_pickled_weights(dacc, pipeline, unchanged):
    (pipeline / "unet" / WEIGHTS).rename(pipeline / "unet/diffusion_pytorch_model.bin")
    message = refuse(dacc, unchanged, 3, "quantize", pipeline)
    assert "Reading a pickle can run any code" in message
    assert "safe_serialization=True" in message


def test_verify_of_a_pipeline_that_is_no_bundle(dacc, pipeline, unchanged):
    assert "not a dacc bundle" in refuse(dacc, unchanged, 3, "verify", pipeline)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_the_weights(dacc, pipeline, unchanged, value):
    def spoil(tensors):
        tensors["up_blocks.1.resnets.0.conv1.weight"][0, 0, 0, 0] = value

    edit_weights(pipeline / "unet" / WEIGHTS, spoil)
    message = refuse(dacc, unchanged, 3, "quantize", pipeline)
    assert "up_blocks.1.resnets.0.conv1.weight holds NaN or infinity" in message


def test_weights_of_another_model(dacc, pipeline, unchanged):
    edit_weights(pipeline / "unet" / WEIGHTS, lambda tensors: tensors.pop("mid_block.resnets.1.conv2.weight"))
    assert "mid_block.resnets.1.conv2.weight is missing" in refuse(dacc, unchanged, 3, "quantize", pipeline)


def test_a_config_that_is_not_json(dacc, pipeline, unchanged):
    (pipeline / "unet/config.json").write_text("{")
    refuse(dacc, unchanged, 4, "quantize", pipeline)


def test_a_zoo_folder_without_an_index(dacc, unchanged, tmp_path, monkeypatch):
    monkeypatch.setenv("DACC_ZOO", str(tmp_path))
    assert "Correct or unset the variable" in refuse(dacc, unchanged, 3, "zoo", "list")


# damage, exit code 4


def shard(pipeline: Path) -> Path:
    """Split the weights of a pipeline in two; the second of the shards."""
    tensors = load_file(pipeline / "unet" / WEIGHTS)
    (pipeline / "unet" / WEIGHTS).unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in ((1, names[::2]), (2, names[1::2])):
        file = pipeline / "unet" / f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file.name)
    (pipeline / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return file


@pytest.mark.parametrize("name", ["quantize", "generate", "evaluate", "inspect"])
def test_a_truncated_weight_file(dacc, pipeline, unchanged, name):
    file = pipeline / "unet" / WEIGHTS
    os.truncate(file, file.stat().st_size - 100)
    assert "is truncated" in refuse(dacc, unchanged, 4, name, pipeline)


def test_a_weight_file_that_is_no_safetensors(dacc, pipeline, unchanged):
    (pipeline / "unet" / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 3)
    refuse(dacc, unchanged, 4, "quantize", pipeline)


def test_a_header_longer_than_allowed(dacc, pipeline, unchanged):
    (pipeline / "unet" / WEIGHTS).write_bytes(struct.pack("<Q", 2**62))
    refuse(dacc, unchanged, 4, "quantize", pipeline)


@pytest.mark.parametrize("name", ["quantize", "generate"])
def test_a_missing_shard(dacc, pipeline, unchanged, name):
    shard(pipeline).unlink()
    assert "00002-of-00002" in refuse(dacc, unchanged, 4, name, pipeline)


@pytest.mark.parametrize("target", ["../../secret.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_a_shard_name_that_leads_out_of_the_folder(dacc, pipeline, unchanged, target):
    shard(pipeline)
    index = pipeline / "unet" / f"{WEIGHTS}.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, "conv_in.weight": target})
    assert target in refuse(dacc, unchanged, 4, "quantize", pipeline)


def test_a_weight_file_that_is_a_link_to_elsewhere(dacc, pipeline, unchanged, tmp_path):
    (pipeline / "unet" / WEIGHTS).rename(tmp_path / "elsewhere.safetensors")
    (pipeline / "unet" / WEIGHTS).symlink_to(tmp_path / "elsewhere.safetensors")
    refuse(dacc, unchanged, 4, "quantize", pipeline)


def test_a_component_name_that_leads_out_of_the_pipeline(dacc, pipeline, unchanged):
    edit_json(pipeline / "model_index.json", **{"../unet": ["diffusers", "UNet2DModel"]})
    assert "leads out" in refuse(dacc, unchanged, 4, "quantize", pipeline)


@pytest.mark.parametrize("name", ["generate", "evaluate", "inspect", "verify"])
def test_a_manifest_of_a_newer_format(dacc, bundle, unchanged, name):
    edit_json(bundle / "dacc_manifest.json", format=99)
    unchanged()
    ran = dacc(name, bundle)
    assert ran.code == 4
    assert "format 99" in ran.err + ran.out
    assert "pip install -U dacc-diffusion" in ran.error
    assert "Copy" not in ran.error
    unchanged()


def test_verify_names_every_damaged_file(dacc, bundle, unchanged):
    file = bundle / "unet" / WEIGHTS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    (bundle / "scheduler/scheduler_config.json").unlink()
    (bundle / "unet/model.safetensors").write_bytes(b"x")
    unchanged()
    ran = dacc("verify", bundle)
    assert ran.code == 4
    assert "dacc" in ran.error or "Copy the bundle again" in ran.error
    for line in (f"unet/{WEIGHTS}: has another content", "scheduler/scheduler_config.json: is missing"):
        assert any(line in found for found in ran.lines)
    assert any(found.startswith("unet/model.safetensors: is not in the manifest") for found in ran.lines)
    unchanged()


def test_verify_gives_its_findings_as_json(dacc, bundle):
    (bundle / "model_index.json").write_text("{}")
    ran = dacc("verify", bundle, "--json")
    assert ran.code == 4
    report = json.loads(ran.out)
    assert (report["schema"], report["intact"]) == (1, False)
    assert [problem["file"] for problem in report["problems"]] == ["model_index.json"]


@pytest.mark.parametrize("name", ["generate", "evaluate", "inspect"])
def test_a_damaged_bundle_is_not_loaded(dacc, bundle, unchanged, name):
    os.truncate(bundle / "unet" / WEIGHTS, 1000)
    assert "dacc verify" in refuse(dacc, unchanged, 4, name, bundle)


# resources, exit code 5


@pytest.mark.parametrize(
    "arguments",
    [["quantize", "pipe", "--measure", "never"], ["generate", "pipe", "--steps", 1], ["zoo", "copy", "digits-dit"]],
    ids=lambda arguments: arguments[0],
)
def test_an_output_that_another_run_is_writing(dacc, pipeline, tmp_path, arguments):
    from dacc.core.lock import WriterLock

    lock = WriterLock(tmp_path / ".out.lock")
    lock.acquire()
    try:
        ran = dacc(*arguments, "-o", tmp_path / "out")
    finally:
        lock.release()
    assert ran.code == 5
    assert f"process {os.getpid()}" in ran.error
    assert "choose another --output" in ran.error
    assert not list(tmp_path.glob("*out*"))


def test_a_disk_without_room_is_seen_before_any_work(dacc, pipeline, unchanged, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    assert "Free some space" in refuse(dacc, unchanged, 5, "quantize", pipeline)


def no_room(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device", "somewhere")


def test_a_disk_that_fills_up_while_the_output_is_written_leaves_the_old_one(dacc, pipeline, tmp_path, monkeypatch):
    from .conftest import snapshot

    old = Path(shutil.copytree(pipeline, tmp_path / "out"))
    before = snapshot(old)
    monkeypatch.setattr("dacc.core.bundle.sync_tree", no_room)
    ran = dacc("quantize", pipeline, "-o", old, "--overwrite", "--measure", "never")
    assert ran.code == 5
    assert "the disk" in ran.error
    assert snapshot(old) == before
    assert not list(tmp_path.glob(".out.lock"))


def test_a_disk_that_fills_up_under_generate_leaves_nothing(dacc, pipeline, unchanged, monkeypatch):
    monkeypatch.setattr("PIL.Image.Image.save", no_room)
    assert "the disk is full" in refuse(dacc, unchanged, 5, "generate", pipeline, "--num", 1, "--steps", 2)


@pytest.mark.parametrize("name", ["quantize", "generate", "evaluate", "zoo copy"])
def test_an_output_below_a_file(dacc, pipeline, unchanged, tmp_path, name):
    name, *source = [*name.split(), "digits-unet"] if name == "zoo copy" else [name, pipeline]
    (tmp_path / "file").write_text("no folder")
    assert "file is not a folder" in refuse(dacc, unchanged, 2, name, *source, "-o", tmp_path / "file/deep/out")


@pytest.mark.parametrize(
    "shortage",
    [MemoryError(), torch.OutOfMemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_too_little_memory(dacc, pipeline, unchanged, monkeypatch, shortage):
    @functools.wraps(DDIMPipeline.__call__)
    def fail(*_: object, **__: object) -> None:
        raise shortage

    monkeypatch.setattr(DDIMPipeline, "__call__", fail)
    assert "not enough memory" in refuse(dacc, unchanged, 5, "generate", pipeline)


# floors, exit code 6


def test_a_missed_floor_leaves_nothing(dacc, pipeline, unchanged):
    message = refuse(dacc, unchanged, 6, "quantize", pipeline, "--bits", 2, "--require", "psnr>=99")
    assert "Nothing was written" in message
    assert "more bits" in message


def test_a_missed_floor_keeps_the_output_that_was_there(dacc, pipeline, unchanged, tmp_path):
    shutil.copytree(pipeline, tmp_path / "out")
    options = ["-o", tmp_path / "out", "--overwrite", "--require", "relative_l2<=0.000001"]
    refuse(dacc, unchanged, 6, "quantize", pipeline, *options)


def test_a_missed_floor_can_be_kept_beside(dacc, pipeline, tmp_path):
    ran = dacc("quantize", pipeline, "-o", "out", "--bits", 2, "--require", "psnr>=99", "--keep-failed")
    assert ran.code == 6
    assert "out.failed" in ran.error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.failed", "pipe"]
    assert (tmp_path / "out.failed/unet/config.json").is_file()


@pytest.mark.parametrize("name", ["quantize", "prune", "search-cache"])
def test_a_floor_about_what_will_not_be_measured_is_refused_at_once(dacc, pipeline, unchanged, name):
    options = ["--measure", "never", "--require", "ssim>=0.1"]
    assert "Leave --measure never out" in refuse(dacc, unchanged, 2, name, pipeline, *options)


@pytest.mark.parametrize("name", ["quantize", "prune", "search-cache"])
def test_a_dry_run_reads_the_floors_too(dacc, pipeline, unchanged, name):
    assert "psnr>=25" in refuse(dacc, unchanged, 2, name, pipeline, "--dry-run", "--require", "psnr")


# unsupported, exit code 7


def test_a_bundle_is_not_quantized_again(dacc, bundle, unchanged):
    assert "zoo:digits-unet" in refuse(dacc, unchanged, 7, "quantize", bundle)


def test_a_scheduler_cannot_be_quantized(dacc, pipeline, unchanged):
    message = refuse(dacc, unchanged, 7, "quantize", pipeline, "--component", "scheduler")
    assert "Choose from unet" in message


def test_a_text_encoder_cannot_be_quantized(dacc, pipeline, unchanged):
    (pipeline / "text_encoder").mkdir()
    (pipeline / "text_encoder/config.json").write_text('{"architectures": ["CLIPTextModel"]}')
    save_file({"embed": torch.ones(4, 4)}, pipeline / "text_encoder/model.safetensors")
    edit_json(pipeline / "model_index.json", text_encoder=["transformers", "CLIPTextModel"])
    message = refuse(dacc, unchanged, 7, "quantize", pipeline, "--component", "text_encoder")
    assert "CLIPTextModel of transformers" in message


def test_a_pipeline_without_a_denoiser(dacc, pipeline, unchanged):
    edit_json(pipeline / "model_index.json", unet=["diffusers", "SomethingElse"])
    (pipeline / "unet").rename(pipeline / "other")
    index = json.loads((pipeline / "model_index.json").read_text())
    index["other"] = index.pop("unet")
    (pipeline / "model_index.json").write_text(json.dumps(index))
    assert "no denoiser" in refuse(dacc, unchanged, 7, "quantize", pipeline)


def test_nothing_left_to_quantize(dacc, pipeline, unchanged):
    assert "Widen --include" in refuse(dacc, unchanged, 7, "quantize", pipeline, "--exclude", "*")
