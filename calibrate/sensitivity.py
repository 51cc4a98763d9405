"""How far an error in what a denoiser gives at one call of a run moves the final sample. Early calls choose what is
drawn and late ones its grain, so that equal errors are not equally bad; methods that train may weigh calls by it.

Letters: C calls of a run, S samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..core.calibration import CalibrationRecord
from ..core.pipeline import denoisers
from ..core.reporter import Reporter
from ..runtime.clock import current_run
from ..runtime.compare import relative_l2
from ..runtime.load import load_source
from ..runtime.request import RunRequest
from ..runtime.trajectory import sample

PROBES = 12  # calls at which an error is made; between them the logarithm is interpolated
SAMPLES = 8  # S, the first of the set
TINY = 1e-12
ERROR = 0.1  # of the root mean square of what the denoiser gives


def call_sensitivity(
    folder: Path, component: str, record: CalibrationRecord, *, device: str, reporter: Reporter
) -> list[float]:
    """(C,): geometric mean over samples of the relative L2 of the final latents for a relative error of 1, white noise,
    in what a denoiser of a pipeline gives at each call.

    Args:
        folder: of the pipeline.
        record: of a calibration set, whose runs are made again.
    """
    pipe: Any = load_source(folder, device=device, cached=False, reporter=reporter)
    runs = record.runs()
    request = RunRequest(
        seeds=tuple(sample.seed for sample in record.samples[:SAMPLES]),
        num_inference_steps=runs.pop("steps"),
        batch_size=record.recipe["batch_size"],
        **runs,
    )
    calls = len(record.schedule.timesteps)
    probes = sorted({round(number * (calls - 1) / (PROBES - 1)) for number in range(PROBES)})
    wanted = sample(pipe, request).latents
    found = {}
    for probe in reporter.progress(probes, "probing"):
        with _wrong_at(denoisers(pipe)[component], probe):
            errors = relative_l2(wanted, sample(pipe, request).latents)
        found[probe] = float(errors.clamp(min=TINY).log().mean().exp()) / ERROR
    return interpolated(found, calls)


def interpolated(found: dict[int, float], calls: int) -> list[float]:
    """Values at all calls from those at some, linear in their logarithm; ones where nothing is known."""
    known = sorted(found)
    if not known:
        return [1.0] * calls
    values = []
    for call in range(calls):
        before = max((place for place in known if place <= call), default=known[0])
        after = min((place for place in known if place >= call), default=known[-1])
        share = (call - before) / (after - before) if after > before else 0.0
        values.append(math.exp((1 - share) * math.log(found[before]) + share * math.log(found[after])))
    return values


@contextmanager
def _wrong_at(denoiser: nn.Module, call: int) -> Iterator[None]:
    """What a denoiser gives is wrong at one call of its runs, by the same noise for every evaluation."""

    def add(_module: nn.Module, _args: Any, output: Any) -> Any:
        state = current_run()
        return tree_map(_with_noise, output) if state is not None and state.call == call else output

    handle = denoiser.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _with_noise(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(value.shape, generator=generator).to(value)
    return value + ERROR * value.square().mean().sqrt() * noise
