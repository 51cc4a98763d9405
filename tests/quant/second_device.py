"""Quantize, and run with offloaded weights, on a second device, made of CPU memory: its operators run on the CPU, but
refuse tensors of both devices, as those of an accelerator do.

    python second_device.py SOURCE FOLDER CASES     # CASES: JSON of output name -> [calibration set, config fields]

A process of its own, since a device cannot be taken back once torch knows it.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration

NAME = "second"
backend_registration._setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)
aten = torch.ops.aten
COPYING = {aten._to_copy.default, aten.copy_.default}  # between devices
USED = Counter[Any]()  # operators that ran on the second device
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}  # with indices from anywhere


class Away(Tensor):
    """A tensor on the second device."""

    here: Tensor  # its memory
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: Tensor, requires_grad: bool = False) -> Tensor:  # accelerate makes anew what it moves
        if isinstance(here, Away):
            return here
        if here.device.type == "meta":
            return torch.nn.Parameter(here, requires_grad)
        away = Tensor._make_wrapper_subclass(
            cls, here.size(), here.stride(), here.storage_offset(), dtype=here.dtype, device=DEVICE
        )
        away.here = here
        return away

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(operator, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = Away(self.here.detach().clone())
        memo[id(self)] = (
            torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied
        )
        return memo[id(self)]

    def data_ptr(self) -> int:
        return self.here.data_ptr()

    def untyped_storage(self) -> Any:
        return self.here.untyped_storage()

    def tolist(self) -> Any:
        return self.here.tolist()


def run(operator: Any, args: Any, kwargs: Any) -> Any:
    """An operator on the memory of its tensors; what it makes is where they are, or where it was told."""
    leaves = list(_leaves((args, kwargs)))
    away = any(isinstance(leaf, Away) for leaf in leaves)
    if away and operator not in COPYING:
        checked = _leaves((args[:1], args[2:])) if operator in INDEXING else leaves
        _refuse_mixed(operator, checked)
    if operator is aten.copy_.default:
        away = isinstance(args[0], Away)
    if (wanted := kwargs.get("device")) is not None:
        away = wanted.type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")} if away else kwargs
    USED[operator] += away
    known = {id(leaf.here): leaf for leaf in leaves if isinstance(leaf, Away)}
    made = operator(*_mapped(args, _here), **_mapped(kwargs, _here))
    if operator is aten._to_copy.default and id(made) in known:
        made = made.clone()
    if not away:
        return made
    return _mapped(made, lambda leaf: known.get(id(leaf), Away(leaf)) if isinstance(leaf, Tensor) else leaf)


def _refuse_mixed(operator: Any, leaves: Iterable[Any]) -> None:
    for leaf in leaves:
        on_cpu = isinstance(leaf, Tensor) and leaf.ndim and not isinstance(leaf, Away)
        if on_cpu or isinstance(leaf, torch.Generator):
            raise RuntimeError(f"{operator}: tensors or generators of the CPU and of {NAME}")


def _here(leaf: Any) -> Any:
    return leaf.here if isinstance(leaf, Away) else leaf


def _leaves(tree: Any) -> Iterator[Any]:
    """Those of torch's trees are much slower."""
    if isinstance(tree, list | tuple | dict):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(branch)
    else:
        yield tree


def _mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(tree, dict):
        return {key: _mapped(branch, change) for key, branch in tree.items()}
    return type(tree)(_mapped(branch, change) for branch in tree) if isinstance(tree, list | tuple) else change(tree)


def main() -> None:
    from dacc.core.reporter import silent
    from dacc.quant import distill
    from dacc.quant.api import quantize_pipeline
    from dacc.quant.config import QuantizeConfig

    source, folder, cases = sys.argv[1:]
    distill.SAVE_SECONDS = 0.0
    for name, (calib, fields) in json.loads(cases).items():
        config = QuantizeConfig(measure="never", **fields)
        make = partial(
            quantize_pipeline, source, config, calib=calib, output=Path(folder) / name, device=NAME, reporter=silent()
        )
        USED.clear()
        try:
            with leaving_after(distill.Training, 2):
                make()
            left = False
        except KeyboardInterrupt:
            left = True
            make()
        assert left == ("updates" in fields.get("settings", {})), f"{name}: trainings alone are interrupted"
        assert USED[aten.convolution.default], f"{name}: the network did not run on the second device"
        check_offloading(Path(folder) / name)


def check_offloading(bundle: Path) -> None:
    """Weights that come to the second device for one layer at a time give what those give that stay there."""
    from accelerate import cpu_offload

    from dacc.runtime.load import load
    from dacc.runtime.request import RunRequest
    from dacc.runtime.trajectory import sample

    whole, request = load(bundle, device="cpu"), RunRequest(seeds=(0, 1), num_inference_steps=3)
    whole.unet.to(DEVICE)
    wanted = sample(whole, request).latents
    for buffers in (False, True):
        pipe = load(bundle, device="cpu")
        cpu_offload(pipe.unet, execution_device=DEVICE, offload_buffers=buffers)
        USED.clear()
        assert torch.equal(sample(pipe, request).latents, wanted), f"{bundle.name}: offloaded weights change the result"
        assert USED[aten.convolution.default], f"{bundle.name}: offloaded weights did not come back"


@contextmanager
def leaving_after(training: Any, updates: int) -> Iterator[None]:
    """An interruption behind a checkpoint, of methods that train."""
    save = training.save

    def save_and_leave(self: Any, checkpoint: Any) -> None:
        save(self, checkpoint)
        if self.done == updates:
            raise KeyboardInterrupt

    training.save = save_and_leave
    try:
        yield
    finally:
        training.save = save


if __name__ == "__main__":
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda operator, *args, **kwargs: run(operator, args, kwargs), "PrivateUse1")
    main()
