"""Damage in a bundle is named file by file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dacc.core.errors import BundleError, ModelError
from dacc.core.manifest import ComponentRecord, FileRecord, Manifest, SourceRecord
from dacc.core.safe_read import file_sha256, weight_hash
from dacc.core.verify import Problem, check_bundle, verify_bundle

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def intact(make_pipeline) -> Path:
    folder = make_pipeline("bundle")
    files = {
        str(file.relative_to(folder)): FileRecord(size=file.stat().st_size, sha256=file_sha256(file))
        for file in folder.rglob("*")
        if file.is_file()
    }
    record = ComponentRecord(
        class_name="UNet2DModel",
        weight_hash=weight_hash(folder / "unet"),
        reference_hash="",
        parameters=1,
        bytes_fp32=4,
        bytes_before=4,
        bytes_after=4,
    )
    source = SourceRecord(name="pipe", weights={})
    manifest = Manifest(
        requires={}, source=source, pipeline="TinyPipeline", passes=[], components={"unet": record}, files=files
    )
    (folder / "dacc_manifest.json").write_text(manifest.to_json())
    (folder / "README.md").write_text("# card")
    return folder


def edit_manifest(folder: Path, edit) -> None:
    raw = json.loads((folder / "dacc_manifest.json").read_text())
    edit(raw)
    (folder / "dacc_manifest.json").write_text(json.dumps(raw))


def flip_last_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_a_folder_may_be_given_as_text(intact):
    assert verify_bundle(str(intact)) == []


@pytest.mark.parametrize("deep", [True, False])
def test_an_intact_bundle_has_no_problems(intact, deep):
    (intact / "sample.png").write_bytes(b"the user's own picture")
    (intact / "evaluation.json").write_text("{}")
    assert verify_bundle(intact, deep=deep) == []
    assert check_bundle(intact).pipeline == "TinyPipeline"


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda folder: (folder / "tokenizer/merges.txt").unlink(), ("tokenizer/merges.txt", "is missing")),
        (lambda folder: (folder / WEIGHTS).unlink(), (WEIGHTS, "is missing")),
        (lambda folder: os.truncate(folder / WEIGHTS, 700), (WEIGHTS, "has 700 bytes; the manifest says")),
        (lambda folder: os.truncate(folder / WEIGHTS, 700), ("unet", "is truncated")),
        (lambda folder: (folder / "unet/config.json").write_text("{}"), ("unet/config.json", "has 2 bytes")),
        (lambda folder: (folder / "unet/model.safetensors").write_bytes(b""), ("unet/model.safetensors", "is not in")),
        (lambda folder: (folder / "unet/x.bin").write_bytes(b""), ("unet/x.bin", "is not in the manifest")),
        (
            lambda folder: (folder / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
            ("unet", "names '../x.safetensors'"),
        ),
        (
            lambda folder: edit_manifest(folder, lambda raw: raw["files"].update({"../x": raw["files"][WEIGHTS]})),
            ("../x", "leads out of the bundle"),
        ),
        (
            lambda folder: edit_manifest(
                folder, lambda raw: raw["files"].update({"/etc/passwd": raw["files"][WEIGHTS]})
            ),
            ("/etc/passwd", "leads out of the bundle"),
        ),
        (
            lambda folder: ((folder / WEIGHTS).rename(folder.parent / "x"), (folder / WEIGHTS).symlink_to("../../x")),
            (WEIGHTS, "leads out of its folder"),
        ),
        (lambda folder: edit_manifest(folder, lambda raw: raw.update(format=9)), ("dacc_manifest.json", "format 9")),
        (lambda folder: (folder / "dacc_manifest.json").write_text("{"), ("dacc_manifest.json", "not readable JSON")),
        (lambda folder: (folder / "model_index.json").unlink(), ("model_index.json", "is missing")),
    ],
)
def test_each_damaged_missing_or_added_file_is_named(intact, spoil, expected):
    spoil(intact)
    for problems in (verify_bundle(intact), verify_bundle(intact, deep=False)):
        assert [found for found in problems if found.file == expected[0] and expected[1] in found.problem], problems
    with pytest.raises(BundleError, match=expected[0].replace(".", r"\.")):
        check_bundle(intact)


def test_a_changed_byte_needs_the_deep_check(intact):
    flip_last_byte(intact / WEIGHTS)
    assert verify_bundle(intact, deep=False) == []
    assert verify_bundle(intact) == [
        Problem("unet", "has other weights than the manifest says"),
        Problem(WEIGHTS, "has another content than the manifest says"),
    ]


def test_several_damaged_files_are_all_listed(intact):
    (intact / "tokenizer/merges.txt").unlink()
    (intact / "model_index.json").write_text("{}")
    assert [found.file for found in verify_bundle(intact)] == ["model_index.json", "tokenizer/merges.txt"]


def test_a_bundle_in_a_hub_cache_may_link_into_its_blobs(make_hub_cache, intact):
    cache = make_hub_cache()
    snapshot = cache / "models--owner--tiny/snapshots" / ("c" * 40)
    (snapshot / "dacc_manifest.json").write_bytes((intact / "dacc_manifest.json").read_bytes())
    assert verify_bundle(snapshot) == []


def test_only_a_bundle_can_be_verified_but_any_pipeline_can_be_checked(make_pipeline):
    folder = make_pipeline()
    with pytest.raises(ModelError, match="is not a dacc bundle"):
        verify_bundle(folder)
    assert check_bundle(folder) is None
    os.truncate(folder / WEIGHTS, 700)
    with pytest.raises(BundleError, match=r"unet diffusion_pytorch_model.safetensors is truncated"):
        check_bundle(folder)
