"""Work memory that survives between calls. A fresh large CPU tensor costs a page fault per 4 KiB, often more time than
the arithmetic done in it; a kernel that is not being traced or differentiated takes its intermediates from here."""

import threading
from math import prod

import torch
from torch import Tensor

_local = threading.local()  # one set of buffers per thread: kernels may run in several threads at once


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor, valid until the same thread asks for the same name again."""
    size_bytes = prod(shape) * dtype.itemsize
    buffer = getattr(_local, name, None)
    if buffer is None or buffer.numel() < size_bytes:
        with torch.inference_mode(False):  # an inference tensor could not be written to outside inference mode
            buffer = torch.empty(size_bytes, dtype=torch.uint8)
        setattr(_local, name, buffer)
    return buffer[:size_bytes].view(dtype).view(shape)


def may_use_scratch(x: Tensor) -> bool:
    """Not under torch.compile (which plans memory itself), nor where autograd would keep what we overwrite."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    return not (torch.is_grad_enabled() and x.requires_grad)
