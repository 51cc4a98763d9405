"""A denoiser as a graph: PyTorch's tracing exporter to ONNX, on inputs that the pipeline itself makes.

The tracer and not torch.export: it takes a tenth of the time where the batch is left open, and keeps each parameter as
one named input, so that weights can be put in afterwards in any number format.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import UnsupportedError
from ..core.pipeline import denoisers
from ..runtime.load import load_source
from ..runtime.request import RunRequest
from ..runtime.skeleton import build_skeleton
from ..runtime.trajectory import call_pipeline
from .contents import Contents

OPSET = 20  # the newest that the tracer writes
OUTPUT = "output"
PREFIX = "model."  # of the names of weights in the graph
SAMPLES = (2, 3)  # dimensions that differ between such runs are left open


class _Captured(Exception):
    """Ends a run at the first call of the denoiser."""


@dataclass(frozen=True)
class Example:
    """One call of a denoiser."""

    tensors: dict[str, Tensor]  # by argument; `argument.key` of those in a dictionary
    others: dict[str, Any]  # arguments that become part of the graph


class Traceable(nn.Module):
    """A denoiser that takes tensors only, by position, and returns one."""

    def __init__(self, model: nn.Module, example: Example) -> None:
        super().__init__()
        self.model = model
        self._names, self._others = list(example.tensors), example.others

    def forward(self, *values: Tensor) -> Tensor:
        """Call the denoiser."""
        arguments: dict[str, Any] = {
            key: dict(value) if isinstance(value, dict) else value for key, value in self._others.items()
        }
        for name, value in zip(self._names, values, strict=True):
            argument, _, key = name.partition(".")
            if key:
                arguments[argument][key] = value
            else:
                arguments[argument] = value
        output: Tensor = self.model(**arguments, return_dict=False)[0]
        return output


def load_float(contents: Contents) -> nn.Module:
    """The model of a component in float32, integers dequantized."""
    model = build_skeleton(contents.folder)
    state = {name: contents.load(name) for name in contents.shapes()}
    model.load_state_dict(
        {name: value.float() if value.is_floating_point() else value for name, value in state.items()}, assign=True
    )
    return model.eval()


def examples_of(pipeline: Path, component: str) -> list[Example]:
    """What enters a denoiser first in runs of as many samples as `SAMPLES` says.

    Raises:
        UnsupportedError: the pipeline does not call the component at each step.
    """
    pipe = load_source(pipeline, dtype="float32", device="cpu", cached=False)
    if component not in denoisers(pipe):
        raise UnsupportedError(
            f"{component} is no denoiser.", "Its inputs are found by running the pipeline.", "Choose another --format."
        )
    return [_first_call(pipe, component, samples) for samples in SAMPLES]


def write_graph(model: nn.Module, examples: list[Example], file: Path) -> None:
    """Write the graph without its weights, which are inputs under their names after `PREFIX`."""
    first, second = examples
    traced = Traceable(model, first)
    open_axes: dict[str, dict[int, str]] = {OUTPUT: {0: "batch"}}
    for name, tensor in first.tensors.items():
        pairs = zip(tensor.shape, second.tensors[name].shape, strict=True)
        open_axes[name] = {axis: "batch" for axis, (one, other) in enumerate(pairs) if one != other}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's remarks on constants of shapes that stay fixed
        torch.onnx.export(
            traced,
            tuple(first.tensors.values()),
            str(file),
            dynamo=False,
            opset_version=OPSET,
            input_names=list(first.tensors),
            output_names=[OUTPUT],
            dynamic_axes={name: axes for name, axes in open_axes.items() if axes},
            do_constant_folding=False,
            export_params=False,
        )


def _first_call(pipe: Any, component: str, samples: int) -> Example:
    denoiser = denoisers(pipe)[component]
    seen: list[Mapping[str, Any]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
        raise _Captured

    hook = denoiser.register_forward_pre_hook(keep, with_kwargs=True, prepend=True)
    request = RunRequest(seeds=tuple(range(samples)), num_inference_steps=2)
    try:
        call_pipeline(pipe, request, range(samples), on_step=lambda _: None)
    except _Captured:
        return _split(seen[0])
    finally:
        hook.remove()
    raise UnsupportedError(f"{type(pipe).__name__} did not call {component}.")


def _split(arguments: Mapping[str, Any]) -> Example:
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for name, value in arguments.items():
        if name == "return_dict":
            continue
        if isinstance(value, dict) and any(torch.is_tensor(part) for part in value.values()):
            tensors |= {f"{name}.{key}": part for key, part in value.items() if torch.is_tensor(part)}
            others[name] = {key: part for key, part in value.items() if not torch.is_tensor(part)}
        elif torch.is_tensor(value):
            tensors[name] = value.detach().clone()
        elif name == "timestep":  # a number, which would become a constant of the graph
            tensors[name] = torch.tensor(value)
        else:
            others[name] = value
    return Example(tensors, others)
