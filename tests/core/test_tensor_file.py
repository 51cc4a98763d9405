"""Streamed safetensors files: the library reads them, and equal tensors give its very bytes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save

from dacc.core.safe_read import component_tensors
from dacc.core.tensor_file import StoredTensor, stored_tensors, tensor_bytes, write_tensors, write_weights

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.float32,
    torch.int64,
    torch.float64,
    torch.complex64,
]


def every_dtype() -> dict[str, torch.Tensor]:
    tensors = {f"t{number}": torch.arange(3).to(dtype) for number, dtype in enumerate(DTYPES)}
    return tensors | {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 3), "Ünïcode": torch.ones(2, 2)}


def test_the_bytes_are_those_of_the_safetensors_library(tmp_path):
    write_tensors(tmp_path / "x.safetensors", every_dtype(), {"format": "pt"})
    assert (tmp_path / "x.safetensors").read_bytes() == save(every_dtype(), metadata={"format": "pt"})


def test_views_and_transposed_tensors_are_written_as_they_look(tmp_path):
    whole = torch.randn(4, 6)
    views = {
        "row": whole[1],
        "transposed": whole.t(),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    write_tensors(tmp_path / "x.safetensors", views, {})
    read = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(read[name], views[name]) for name in views)


def test_metadata_is_sorted_whatever_order_it_came_in(tmp_path):
    for name, metadata in (("a", {"x": "1", "format": "pt"}), ("b", {"format": "pt", "x": "1"})):
        write_tensors(tmp_path / name, {"t": torch.ones(1)}, metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_stored_tensors_are_read_on_demand_and_can_change_type(tmp_path):
    write_tensors(tmp_path / "model.safetensors", every_dtype(), {})
    stored = stored_tensors(tmp_path)
    assert all(
        torch.equal(stored[name].load().float(), value.float())
        for name, value in every_dtype().items()
        if name != "t12"
    )
    half = stored["Ünïcode"].to("BF16")
    assert (half.dtype, tensor_bytes(half), half.load().dtype) == ("BF16", 8, torch.bfloat16)
    assert stored["scalar"].load().shape == ()


def test_stored_tensors_pass_through_unread_and_converted(tmp_path):
    (tmp_path / "new").mkdir()
    write_tensors(tmp_path / "model.safetensors", every_dtype(), {})
    stored = stored_tensors(tmp_path)
    write_tensors(tmp_path / "new/model.safetensors", {**stored, "t9": stored["t9"].to("F16")}, {"format": "pt"})
    expected = every_dtype() | {"t9": every_dtype()["t9"].half()}
    assert (tmp_path / "new/model.safetensors").read_bytes() == save(expected, metadata={"format": "pt"})


@pytest.mark.parametrize(("shard_bytes", "files"), [(10**9, 1), (250, 3), (1, 6)])
def test_large_components_are_split_as_diffusers_names_them(tmp_path, shard_bytes, files):
    tensors = {f"w{number}": torch.full((5, 5), float(number)) for number in range(6)}
    write_weights(tmp_path, "diffusion_pytorch_model", tensors, {"format": "pt"}, shard_bytes)
    found = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(found) == files
    assert list(component_tensors(tmp_path)) == sorted(tensors)
    if files > 1:
        assert found[0] == f"diffusion_pytorch_model-00001-of-{files:05d}.safetensors"
        index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 600
    assert all(torch.equal(stored.load(), tensors[name]) for name, stored in stored_tensors(tmp_path).items())


def test_nothing_half_written_takes_the_name_of_a_file(tmp_path, monkeypatch):
    write_tensors(tmp_path / "model.safetensors", {"a": torch.ones(2)}, {})
    before = (tmp_path / "model.safetensors").read_bytes()

    def broken(self: StoredTensor):
        yield b"\0"
        raise OSError(28, "No space left on device")

    stored = stored_tensors(tmp_path)
    monkeypatch.setattr(StoredTensor, "chunks", broken)
    with pytest.raises(OSError, match="No space"):
        write_tensors(tmp_path / "model.safetensors", stored, {})
    assert (tmp_path / "model.safetensors").read_bytes() == before
