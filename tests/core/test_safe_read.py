"""Hostile and damaged weight files are refused by name before anything is mapped."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dacc.core.errors import BundleError
from dacc.core.safe_read import (
    component_tensors,
    file_sha256,
    read_header,
    read_json,
    resolve_shards,
    weight_hash,
    weight_stem,
)

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write_raw(file: Path, header: object, data: bytes = b"\0" * 8) -> Path:
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def test_a_header_tells_type_shape_and_place_of_every_tensor(tmp_path):
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.int8), "none": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert {name: (info.dtype, info.shape, info.end - info.start) for name, info in header.items()} == {
        "a": ("F32", (2, 3), 24),
        "none": ("F32", (0, 4), 0),
        "b": ("I8", (5,), 5),
    }
    assert max(info.end for info in header.values()) == (tmp_path / "x.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"a": {**GOOD, "dtype": "F31"}}, "unknown dtype"),
        ({"a": {**GOOD, "shape": [3]}}, "8 bytes; F32"),
        ({"a": {**GOOD, "shape": [-2]}}, "impossible shape"),
        ({"a": {**GOOD, "shape": [True, 2]}}, "impossible shape"),
        ({"a": {**GOOD, "data_offsets": [8, 0]}}, "impossible shape"),
        ({"a": {**GOOD, "data_offsets": [0, 8, 16]}}, "impossible shape"),
        ({"a": {**GOOD, "extra": 1}}, "other fields"),
        ({"a": GOOD, "b": {**GOOD, "shape": [1], "data_offsets": [4, 8]}}, "overlapping bytes before tensor 'b'"),
        ({"a": {**GOOD, "shape": [1], "data_offsets": [4, 8]}}, "a hole before tensor 'a'"),
        ({"a": {**GOOD, "shape": [4], "data_offsets": [0, 16]}}, "truncated"),
        ({"a": {**GOOD, "shape": [1], "data_offsets": [0, 4]}}, "4 bytes that belong to no tensor"),
        ({"__metadata__": {"format": 1}, "a": GOOD}, "not text to text"),
        ([1, 2], "not a table"),
        ('{"a": 1, "a": 2}', "'a' appears twice"),
        ("[" * 200_000, "nested too deep"),
        ("{not json", "no valid JSON"),
    ],
)
def test_a_header_that_does_not_agree_with_itself_is_refused(tmp_path, header, reason):
    file = write_raw(tmp_path / "bad.safetensors", header)
    with pytest.raises(BundleError, match=reason) as caught:
        read_header(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("length", [10**12, 2**63, 100])
def test_a_header_length_beyond_the_file_takes_no_memory(tmp_path, length):
    file = tmp_path / "bad.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(BundleError, match="truncated"):
        read_header(file)


def test_a_header_beyond_the_limit_of_the_format_is_refused(tmp_path):
    file = tmp_path / "bad.safetensors"
    file.write_bytes((100_000_001).to_bytes(8, "little"))
    os.truncate(file, 100_000_100)  # sparse
    with pytest.raises(BundleError, match="the limit is 100000000"):
        read_header(file)


@pytest.mark.parametrize("kept", [0, 4, 60, -1])
def test_a_truncated_file_is_named(make_pipeline, kept):
    file = make_pipeline() / "unet/diffusion_pytorch_model.safetensors"
    os.truncate(file, kept if kept >= 0 else file.stat().st_size - 1)
    with pytest.raises(BundleError, match=r"unet/diffusion_pytorch_model.safetensors .*truncated"):
        read_header(file)


def test_json_longer_than_the_limit_is_not_read(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1}')
    with pytest.raises(BundleError, match="longer than 4 bytes"):
        read_json(tmp_path / "x.json", limit=4)


@pytest.mark.parametrize("shards", [1, 3])
def test_shards_come_from_the_index_or_the_single_file(make_pipeline, shards):
    folder = make_pipeline(shards=shards) / "unet"
    assert list(resolve_shards(folder)) == sorted(file.name for file in folder.glob("*.safetensors"))
    assert list(component_tensors(folder)) == [f"blocks.{number}.weight" for number in range(6)]
    assert weight_stem(folder) == "diffusion_pytorch_model"


def test_a_variant_is_read_only_when_nothing_else_is_there(make_pipeline):
    folder = make_pipeline() / "unet"
    plain = folder / "diffusion_pytorch_model.safetensors"
    (folder / "diffusion_pytorch_model.fp16.safetensors").write_bytes(plain.read_bytes())
    assert list(resolve_shards(folder)) == [plain.name]
    plain.unlink()
    assert list(resolve_shards(folder)) == ["diffusion_pytorch_model.fp16.safetensors"]
    assert weight_stem(folder) == "diffusion_pytorch_model"


@pytest.mark.parametrize(
    "name", ["../text_encoder/model.safetensors", "/etc/passwd", "..", "", "x.bin", 3, "a\\b.safetensors"]
)
def test_an_index_cannot_lead_out_of_its_folder(make_pipeline, name):
    folder = make_pipeline(shards=2) / "unet"
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(BundleError, match=r"index.json names .* not a plain safetensors file name"):
        resolve_shards(folder)


def test_a_missing_shard_is_named(make_pipeline):
    folder = make_pipeline(shards=3) / "unet"
    (folder / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(BundleError, match="00002-of-00003.safetensors is missing"):
        resolve_shards(folder)


def test_an_index_that_disagrees_with_its_shards_is_refused(make_pipeline):
    folder = make_pipeline(shards=2) / "unet"
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["blocks.9.weight"] = "diffusion_pytorch_model-00001-of-00002.safetensors"
    index.write_text(json.dumps(raw))
    with pytest.raises(BundleError, match=r"does not agree with the shards about tensor 'blocks.9.weight'"):
        component_tensors(folder)


def test_a_folder_without_weights_is_refused(make_pipeline):
    with pytest.raises(BundleError, match="holds no safetensors weights"):
        resolve_shards(make_pipeline() / "scheduler")


@pytest.mark.parametrize(
    ("target", "reason"), [("../../elsewhere", "leads out of its folder"), ("nothing", "is a link to nothing")]
)
def test_a_link_out_of_the_pipeline_is_refused(make_pipeline, tmp_path, target, reason):
    folder = make_pipeline() / "unet"
    (tmp_path / "elsewhere").write_bytes(b"x")
    file = folder / "diffusion_pytorch_model.safetensors"
    file.unlink()
    file.symlink_to(target)
    with pytest.raises(BundleError, match=reason):
        resolve_shards(folder)


def test_a_link_within_the_pipeline_is_followed(make_pipeline):
    folder = make_pipeline()
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(folder / "shared.safetensors")
    (folder / "unet/diffusion_pytorch_model.safetensors").symlink_to("../shared.safetensors")
    assert len(component_tensors(folder / "unet")) == 6


def test_links_into_the_blobs_of_the_same_hub_repository_are_followed(make_hub_cache):
    cache = make_hub_cache()
    folder = cache / "models--owner--tiny/snapshots" / ("c" * 40) / "unet"
    assert len(component_tensors(folder)) == 6
    weights = folder / "diffusion_pytorch_model.safetensors"
    other = cache / "models--other--model/blobs/1234"
    other.parent.mkdir(parents=True)
    weights.resolve().rename(other)
    weights.unlink()
    weights.symlink_to(other)
    with pytest.raises(BundleError, match="leads out of its folder"):
        resolve_shards(folder)


def test_the_store_that_a_hub_cache_shares_must_carry_its_mark(make_hub_cache):
    cache = make_hub_cache()
    folder = cache / "models--owner--tiny/snapshots" / ("c" * 40) / "unet"
    blob = (folder / "diffusion_pytorch_model.safetensors").resolve()
    shared = cache / "blobs/ab/abcd"
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(shared)
    with pytest.raises(BundleError, match="leads out of its folder"):
        resolve_shards(folder)
    (cache / "blobs/.huggingface-shared-blobs").write_text("1\n")
    assert len(component_tensors(folder)) == 6


def test_the_weight_hash_follows_content_and_nothing_else(make_pipeline):
    first, second = make_pipeline("first") / "unet", make_pipeline("second") / "unet"
    (second / "config.json").write_text("{}")
    assert weight_hash(first) == weight_hash(second)
    file = second / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert weight_hash(first) != weight_hash(second)
    assert len(file_sha256(file)) == 64
