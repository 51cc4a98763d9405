"""Run a pipeline from fixed noise, capture what enters its denoiser, and measure what a treatment changed.

Every sample draws its noise from a generator of its own, so it does not depend on the batch that it is in.
Letters: N samples, C channels, H height, W width.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..core.config import Config
from ..core.errors import ConfigError, UnsupportedError
from ..core.manifest import Effect
from ..core.pipeline import denoisers
from ..core.reporter import Reporter, silent
from ..core.seeds import seed_stream
from ..core.zoo import ZooEntry
from .clock import RunState, attach_clock, current_run, fixed_run, observe_steps, reset_clock
from .compare import Samples, compare

DEFAULT_PROMPTS = (
    "a photograph of a red bicycle leaning against a brick wall",
    "a watercolor painting of a lighthouse at dusk",
    "a close-up portrait of an old fisherman, soft window light",
    "a bowl of fruit on a wooden table",
)
PROBE_STEPS = 2  # some solvers cannot do one


class RunRequest(Config):
    """What to sample. Labels and prompts are dealt to the samples in turn, again from the first when they run out."""

    seeds: tuple[int, ...] = Field(min_length=1)  # one per sample
    num_inference_steps: int = Field(default=10, ge=1)
    guidance_scale: float | None = None  # None: the pipeline's default
    class_labels: tuple[int, ...] | None = None  # None: 0, 1, 2, ... where the pipeline wants classes
    prompts: tuple[str, ...] | None = None  # None: a few neutral prompts where the pipeline wants one
    negative_prompt: str | None = None
    height: int | None = None  # pixels; None: the pipeline's default
    width: int | None = None
    batch_size: int = Field(default=16, ge=1)  # samples per pipeline call; larger: faster, more memory

    @model_validator(mode="after")
    def _check(self) -> RunRequest:
        if self.class_labels == () or self.prompts == ():
            raise ValueError("class_labels and prompts must not be empty")
        return self

    def with_zoo_defaults(self, entry: ZooEntry | None) -> RunRequest:
        """Guidance and classes of a zoo pipeline where the request leaves them open."""
        if entry is None:
            return self
        guidance = self.guidance_scale if self.guidance_scale is not None else entry.guidance_scale
        known = entry.classes if entry.conditioning == "class" else None
        labels = tuple(range(known) if isinstance(known, int) else (int(value) for value in known or ()))
        return self.model_copy(update={"guidance_scale": guidance, "class_labels": self.class_labels or labels or None})

    def batches(self) -> Iterator[range]:
        """Positions of the samples of each pipeline call."""
        for start in range(0, len(self.seeds), self.batch_size):
            yield range(start, min(start + self.batch_size, len(self.seeds)))


@dataclass(frozen=True)
class DenoiserCall:
    """Exactly what entered a denoiser once."""

    component: str
    state: RunState | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @torch.no_grad()
    def replay(self, denoiser: nn.Module) -> Any:
        """Evaluate `denoiser` on it, with the run context that it had."""
        with fixed_run(self.state):
            return denoiser(*self.args, **self.kwargs)


def sample(pipe: Any, request: RunRequest, *, reporter: Reporter | None = None) -> Samples:
    """Run the pipeline on all seeds of the request.

    Raises:
        ConfigError: the request sets something that this pipeline does not have.
        UnsupportedError: the pipeline needs inputs that a request cannot give.
    """
    attach_clock(pipe)
    latents, images = [], []
    batches = list(request.batches())
    with _no_bar(pipe):
        for positions in (reporter or silent()).progress(batches, "sampling"):
            batch_latents, batch_images = run_batch(pipe, request, positions)
            latents.append(batch_latents)
            images.append(batch_images)
    return Samples(torch.cat(latents), torch.cat(images))


def run_batch(pipe: Any, request: RunRequest, positions: range) -> tuple[Tensor, Tensor]:
    """One pipeline call for some samples of a request: their latents (N, ...) and images (N, C, H, W)."""
    arguments = call_arguments(pipe, request, positions)
    last: list[Tensor] = []

    def keep(prev_sample: Tensor) -> None:
        last[:] = [prev_sample]

    # stochastic solvers that ignore `generator` draw from the global one, which is put back afterwards
    devices = [pipe.device] if pipe.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), observe_steps(keep):
        torch.manual_seed(request.seeds[positions[0]])
        try:
            output = pipe(**arguments)
        finally:
            reset_clock()  # also when the run failed or stopped early
    images = _as_images(output)
    if not last:
        raise UnsupportedError(
            f"the scheduler of {type(pipe).__name__} made no step.", "Runs are compared by its samples."
        )
    return last[0][: len(positions)].detach().float().cpu(), images  # guidance may have doubled the batch


def call_arguments(pipe: Any, request: RunRequest, positions: range) -> dict[str, Any]:
    """Arguments of the pipeline call, chosen by its signature.

    Raises:
        ConfigError: the request sets something that this pipeline does not have.
        UnsupportedError: the pipeline needs inputs that a request cannot give.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    # CPU generators give the same noise whatever the device is
    generators = [torch.Generator("cpu").manual_seed(request.seeds[position]) for position in positions]
    arguments: dict[str, Any] = {
        "generator": generators,
        "num_inference_steps": request.num_inference_steps,
        "output_type": "pt",
        "eta": 0.0,
    }
    if "class_labels" in parameters:
        labels = request.class_labels or tuple(range(_classes(pipe)))
        arguments["class_labels"] = [labels[position % len(labels)] for position in positions]
    elif "prompt" in parameters:
        prompts = request.prompts or DEFAULT_PROMPTS
        arguments["prompt"] = [prompts[position % len(prompts)] for position in positions]
    else:
        arguments["batch_size"] = len(positions)
    if request.negative_prompt is not None:
        arguments["negative_prompt"] = [request.negative_prompt] * len(positions)
    for name in ("guidance_scale", "height", "width"):
        if (value := getattr(request, name)) is not None:
            arguments[name] = value
    arguments = {name: value for name, value in arguments.items() if name != "eta" or name in parameters}
    _check_arguments(type(pipe).__name__, parameters, arguments, request)
    return arguments


def measure_effect(
    reference_pipe: Any,
    other_pipe: Any,
    *,
    seeds: int = 4,
    steps: int = 10,
    seed: int = 0,
    budget_seconds: float = 60.0,
    request: RunRequest | None = None,
    reporter: Reporter | None = None,
) -> Effect:
    """How far a treated pipeline is from its float reference from the same noise.

    Args:
        seeds: samples to compare.
        steps: solver steps of each.
        seed: the user's seed; the samples come from the stream "effect".
        budget_seconds: nothing is measured when a probe of two steps says that it would take longer.
        request: guidance, labels or prompts to use; its seeds and steps are replaced.
    """
    reporter = reporter or silent()
    settings = (request or RunRequest(seeds=(0,))).model_copy(
        update={"seeds": seed_stream("effect", seed, seeds), "num_inference_steps": steps, "batch_size": seeds}
    )
    try:
        expected = sum(_estimate(pipe, settings, budget_seconds) for pipe in (reference_pipe, other_pipe))
        if expected > budget_seconds:
            reporter.say(f"measuring would take about {expected:.0f} s")  # not in the notice: it differs between runs
            return _unmeasured(f"it would take more than {budget_seconds:.0f} s", reporter)
        with reporter.stage("comparing with the reference"):
            effect = compare(sample(reference_pipe, settings), sample(other_pipe, settings), steps=steps)
    except UnsupportedError as error:
        return _unmeasured(str(error), reporter)
    if effect.not_measured:
        return _unmeasured(effect.not_measured, reporter)
    return effect


def capture_calls(pipe: Any, request: RunRequest, *, components: list[str] | None = None) -> list[DenoiserCall]:
    """Run the request and keep every denoiser call, in order. Holds all inputs in memory: for short runs.

    Args:
        components: names of the denoisers to watch; all by default.
    """
    attach_clock(pipe)  # first, so that the clock's hook runs before ours
    calls: list[DenoiserCall] = []

    def watch(name: str, module: nn.Module) -> Any:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(DenoiserCall(name, current_run(), tree_map(_copied, args), tree_map(_copied, kwargs)))

        return module.register_forward_pre_hook(record, with_kwargs=True)

    with ExitStack() as stack:
        for name, module in denoisers(pipe).items():
            if components is None or name in components:
                stack.callback(watch(name, module).remove)
        sample(pipe, request)
    return calls


def _copied(value: Any) -> Any:
    return value.detach().clone() if torch.is_tensor(value) else value


def _estimate(pipe: Any, request: RunRequest, budget_seconds: float) -> float:
    """Seconds that a request will take, from a few steps: of one sample, and if that looks long, warm and of all."""
    expected = float("inf")
    for seeds in (request.seeds[:1], request.seeds):
        probe = request.model_copy(update={"seeds": seeds, "num_inference_steps": PROBE_STEPS})
        started = time.perf_counter()
        sample(pipe, probe)
        per_step = (time.perf_counter() - started) / PROBE_STEPS * len(request.seeds) / len(seeds)
        expected = min(expected, per_step * request.num_inference_steps)
        if expected <= budget_seconds / 2 or per_step * PROBE_STEPS > budget_seconds / 2:
            break
    return expected


def _unmeasured(why: str, reporter: Reporter) -> Effect:
    reporter.notice(f"the effect on images was not measured: {why}.")
    return Effect(not_measured=why)


def _check_arguments(name: str, parameters: Any, arguments: dict[str, Any], request: RunRequest) -> None:
    given = {"class_labels": request.class_labels, "prompt": request.prompts}
    unknown = [key for key in arguments if key not in parameters]
    unknown += [key for key, value in given.items() if value is not None and key not in parameters]
    if unknown:
        raise ConfigError(f"{name} does not take {', '.join(unknown)}.", mend="Leave them out.")
    empty = inspect.Parameter.empty
    fillable = {"self", *arguments}
    needed = [key for key, value in parameters.items() if value.default is empty and key not in fillable]
    if needed:
        raise UnsupportedError(f"{name} needs {', '.join(needed)}.", "dacc runs pipelines that start from noise.")


def _classes(pipe: Any) -> int:
    """How many classes a class-conditional denoiser knows."""
    for denoiser in denoisers(pipe).values():
        config: Any = denoiser.config
        for key in ("num_class_embeds", "num_embeds_ada_norm", "num_classes"):
            if config.get(key):
                return int(config[key])
    return 1


def _as_images(output: Any) -> Tensor:
    """Images of a pipeline output as (N, C, H, W) float32 in [0, 1]: tensors, arrays (N, H, W, C) or PIL images."""
    images = output.images if hasattr(output, "images") else output.frames if hasattr(output, "frames") else output[0]
    if isinstance(images, list):
        images = numpy.stack([numpy.asarray(image) for image in images])
        images = images[..., None] if images.ndim == 3 else images  # grayscale
    if isinstance(images, numpy.ndarray):
        scale = 255.0 if images.dtype == numpy.uint8 else 1.0
        images = torch.from_numpy(images).movedim(-1, -3) / scale
    tensor: Tensor = images
    return tensor.detach().float().cpu().flatten(0, -4).clamp(0, 1)  # videos: frames are images


@contextmanager
def _no_bar(pipe: Any) -> Iterator[None]:
    """Switch the pipeline's own progress bar off."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe._progress_bar_config = before
