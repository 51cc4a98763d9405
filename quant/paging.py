"""What calls hold on their way through the network, in files in place of memory.

A tensor that is paged stays the tensor that it was, with all its views: the memory behind it is that of a file which
has no name and goes with it. The system reads what is used and writes back what is not, so that more calls than memory
could hold may wait in front of a unit. Values stay as they were computed, since calls go on from them: in 16 bits they
would be as far off as what 8-bit weights do.
"""

from __future__ import annotations

import gc
import mmap
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from torch import Tensor

from ..core.errors import ResourceError
from ..core.reporter import Reporter

SHARE = 0.5  # of free memory; what holds more goes to files
SMALLEST = 4096  # bytes; less is not worth a page
ALIGNED = 64  # bytes


def paging_folder(held: int, folder: Path, reporter: Reporter) -> Path | None:
    """Where to page to; None where memory has room for everything.

    Args:
        held: bytes that all calls hold together.
        folder: on the disk to use.

    Raises:
        ResourceError: neither has room.
    """
    free = psutil.virtual_memory().available
    if held <= SHARE * free:
        return None
    disk = shutil.disk_usage(folder).free
    if held > disk:
        raise ResourceError(
            f"the calls of the calibration set hold {held / 1e9:.1f} GB on their way through the network.",
            f"{free / 1e9:.1f} GB of memory are free, and {disk / 1e9:.1f} GB of the disk of {folder.parent}.",
            "Lower --cache-gb, and fewer calls are used.",
        )
    reporter.say(f"calls hold {held / 1e9:.1f} GB, {free / 1e9:.1f} GB of memory are free: they are kept on the disk")
    return folder


@contextmanager
def paged(folder: Path | None) -> Iterator[None]:
    """Tensors that are made inside and alive at the end are paged then; where older ones look into the same memory,
    it stays where it is.

    Args:
        folder: where the files are; None: everything stays in memory.
    """
    if folder is None:
        yield
        return
    gc.freeze()  # what is alive now is not looked through
    try:
        yield
        gc.collect()
        behind: defaultdict[int, list[Tensor]] = defaultdict(list)
        for thing in gc.get_objects():
            if type(thing) is Tensor and thing.layout == torch.strided and thing.device.type == "cpu":
                behind[thing.untyped_storage().data_ptr()].append(thing)
        if own := [tensors for tensors in behind.values() if _is_worth_it(tensors)]:
            _move(own, folder)
    finally:
        gc.unfreeze()


def _is_worth_it(tensors: list[Tensor]) -> bool:
    """Whether the memory behind some tensors is large, and behind no others."""
    storage = tensors[0].untyped_storage()
    users = torch._C._storage_Use_Count(storage._cdata) - 1  # but for `storage`
    return storage.nbytes() >= SMALLEST and users == len(tensors)


def _move(memories: list[list[Tensor]], folder: Path) -> None:
    """Put each memory, behind some tensors, into a file.

    Raises:
        OSError: the disk is full.
    """
    sizes = [_bytes(tensors) for tensors in memories]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // ALIGNED) * ALIGNED)
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, starts[-1])  # on a full disk an error; later it would end the process
        else:
            file.truncate(starts[-1])
        mapped = mmap.mmap(file.fileno(), starts[-1])
    for tensors, start, size in zip(memories, starts[:-1], sizes, strict=True):
        kept = torch.frombuffer(mapped, dtype=torch.uint8, count=size, offset=start)
        kept.copy_(torch.empty(0, dtype=torch.uint8).set_(tensors[0].untyped_storage()))
        for tensor in tensors:
            tensor.set_(kept.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
    if hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_DONTNEED)  # the file has it; not this process until it looks


def _bytes(tensors: list[Tensor]) -> int:
    return tensors[0].untyped_storage().nbytes()
