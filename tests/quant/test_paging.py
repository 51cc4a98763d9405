import errno
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dacc import CalibrateConfig, QuantizeConfig, calibrate_pipeline, quantize_pipeline
from dacc.core.errors import ResourceError
from dacc.core.memory import give_back_memory
from dacc.core.reporter import Reporter
from dacc.quant import paging
from dacc.quant.paging import paged, paging_folder
from dacc.quant.walk import Walk
from dacc.runtime.trajectory import DenoiserCall


class Skipping(nn.Module):
    """Holds two tensors on its way, one of them seen through a view that is written to later."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        early = self.first(x)
        half = early[:, : early.shape[1] // 2]
        middle = self.second(early.relu())
        half += 1
        return self.third(middle + early)


def calls(count: int, rows: int = 50, width: int = 64) -> list[DenoiserCall]:
    generator = torch.Generator().manual_seed(0)
    return [DenoiserCall("unet", None, (torch.randn(rows, width, generator=generator),), {}) for _ in range(count)]


def where(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_a_paged_tensor_and_its_views_are_as_they_were(tmp_path):
    with paged(tmp_path):
        x = torch.arange(4000.0).reshape(40, 100)
        turned, part, text = x.T, x[3:, 7], torch.arange(9000, dtype=torch.int16)
        before = where(x)
    assert where(x) != before
    assert where(turned) == where(part) == where(x)
    assert torch.equal(x, torch.arange(4000.0).reshape(40, 100))
    assert torch.equal(turned, x.T)
    assert turned.stride() == (1, 100)
    assert part.storage_offset() == 307
    assert torch.equal(text, torch.arange(9000, dtype=torch.int16))
    x += 1
    assert float(part[0]) == 308.0
    assert list(tmp_path.iterdir()) == []  # no name, so nothing is left whatever happens


def test_memory_that_others_look_into_stays(tmp_path):
    old, weight = torch.zeros(50, 50), nn.Parameter(torch.zeros(50, 50))
    places = where(old), where(weight)
    with paged(tmp_path):
        part, row, small = old[1:], weight.detach()[0], torch.zeros(8)
        place = where(small)
    assert (where(part), where(row), where(small)) == (*places, place)
    part += 1
    assert float(old[1:].mean()) == 1.0


def test_without_a_folder_nothing_moves():
    with paged(None):
        x = torch.zeros(5000)
        before = where(x)
    assert where(x) == before


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(paging.os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space left"), paged(tmp_path):
        x = torch.ones(5000)
    assert float(x.sum()) == 5000.0


def test_calls_walk_on_with_the_same_bits(tmp_path):
    torch.manual_seed(0)
    model, units = Skipping(), ["first", "second", "third"]
    found = []
    for folder in (None, tmp_path):
        with Walk(model, calls(3), units, folder) as walk:
            found.append([[given.args[0].clone() for given in walk.advance(unit)] for unit in units])
    for plain, moved in zip(*found, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(plain, moved, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_waits_is_not_in_memory_of_the_process(tmp_path):
    def in_memory() -> int:
        give_back_memory()
        fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["RssAnon"].split()[0]) * 1024

    model, given, grown = Skipping(512), calls(20, rows=2000, width=512), []
    held = 20 * 2 * 4 * 2000 * 512  # two tensors of every call
    for folder in (None, tmp_path):
        with Walk(model, given, ["second", "third"], folder) as walk:
            walk.advance("second")
            before = in_memory()
            walk.advance("third")
            grown.append(in_memory() - before)
    assert grown[0] > 0.4 * held
    assert grown[1] < 0.1 * held


def machine(monkeypatch, memory: float, disk: float) -> None:
    monkeypatch.setattr(paging.psutil, "virtual_memory", lambda: SimpleNamespace(available=memory))
    monkeypatch.setattr(paging.shutil, "disk_usage", lambda _: SimpleNamespace(free=disk))


def test_what_memory_holds_stays_in_it(monkeypatch, tmp_path):
    machine(monkeypatch, memory=8e9, disk=0)
    assert paging_folder(int(3.9e9), tmp_path, Reporter(quiet=True)) is None


def test_more_goes_to_the_disk(monkeypatch, tmp_path):
    machine(monkeypatch, memory=8e9, disk=60e9)
    assert paging_folder(int(50e9), tmp_path, Reporter(quiet=True)) == tmp_path


def test_what_neither_holds_is_refused(monkeypatch, tmp_path):
    machine(monkeypatch, memory=8e9, disk=40e9)
    with pytest.raises(ResourceError, match=r"hold 50\.0 GB") as refused:
        paging_folder(int(50e9), tmp_path, Reporter(quiet=True))
    assert "--cache-gb" in refused.value.mend


@pytest.mark.parametrize("method", ["gptq", "tfmq"])
def test_a_pass_that_pages_writes_the_same_bytes(unet_folder, tmp_path, monkeypatch, method):
    small = CalibrateConfig(samples=2, steps=3, batch_size=2, strategy="every-step")
    calib = calibrate_pipeline(unet_folder, small, output=tmp_path / "set")
    settings = {"iterations": 4} if method == "tfmq" else {}
    config = QuantizeConfig(bits=4, act_bits=8, method=method, measure="never", settings=settings)
    moved, move, written = [], paging._move, []
    monkeypatch.setattr(paging, "_move", lambda memories, folder: moved.append(move(memories, folder)))
    for share in (1.0, 0.0):
        monkeypatch.setattr(paging, "SHARE", share)
        bundle = quantize_pipeline(unet_folder, config, calib=calib, output=tmp_path / f"share-{share}")
        written.append((bundle / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
        assert bool(moved) == (share == 0.0)
    assert written[0] == written[1]
