"""Run a pipeline from fixed noise, capture what enters its denoiser, and measure what a treatment changed.

Every sample draws its noise from a generator of its own, so it does not depend on the batch that it is in.
Letters: N samples, F frames of a clip, C channels, H height, W width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..core.errors import ConfigError, UnsupportedError
from ..core.manifest import Effect
from ..core.pipeline import denoisers
from ..core.reporter import Reporter, silent
from ..core.seeds import seed_stream
from .clock import RunState, current_run, fixed_run, reset_clock
from .clockwork import attach_clock, observe_steps
from .compare import Samples, compare
from .request import RunRequest, call_arguments

PROBE_STEPS = 2  # some solvers cannot do one


@dataclass(frozen=True)
class DenoiserCall:
    """Exactly what entered a denoiser once."""

    component: str
    state: RunState | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    truth: tuple[Tensor, Tensor] | None = None  # of a user's pictures: clean samples (N, ...) and the noise in them

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
    reporter = reporter or silent()
    attach_clock(pipe)
    latents, images = [], []
    batches = list(request.batches())
    with _no_bar(pipe):
        for positions in reporter.progress(batches, "sampling"):
            batch_latents, batch_images = run_batch(pipe, request, positions)
            latents.append(batch_latents)
            images.append(batch_images)
    samples = Samples(torch.cat(latents), torch.cat(images))
    _tell_other_size(samples.images, request, reporter)
    return samples


def run_batch(pipe: Any, request: RunRequest, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
    """One pipeline call for some samples of a request: their latents (N, ...) and images or clips."""
    last: list[Tensor] = []

    def keep(prev_sample: Tensor) -> None:
        last[:] = [prev_sample]

    images = _as_images(call_pipeline(pipe, request, positions, on_step=keep))
    if not last:
        raise UnsupportedError(
            f"the scheduler of {type(pipe).__name__} made no step.", "Runs are compared by its samples."
        )
    return last[0][: len(positions)].detach().float().cpu(), images  # guidance may have doubled the batch


def call_pipeline(
    pipe: Any, request: RunRequest, positions: Sequence[int], *, on_step: Callable[[Tensor], None]
) -> Any:
    """Call the pipeline for some samples of a request.

    Args:
        on_step: told the new sample after every scheduler step; may end the run by an exception of its own.

    Raises:
        ConfigError: the pipeline does not take what was asked, such as this size or as many steps.
    """
    arguments = call_arguments(pipe, request, positions)
    # stochastic solvers that ignore `generator` draw from the global one, which is put back afterwards
    devices = [pipe.device] if pipe.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), observe_steps(on_step):
        torch.manual_seed(request.seeds[positions[0]])
        try:
            return pipe(**arguments)
        except ValueError as error:
            if refused := _refused(error, pipe, request):
                raise refused from None
            raise
        finally:
            reset_clock()  # also when the run failed or stopped early


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

    Where no denoiser was treated (but a VAE, say) the latents are the same and their distance says nothing: it is not
    measured then, so that no floor about it is met.

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
    if effect.relative_l2 == 0 and not _denoisers_differ(reference_pipe, other_pipe):
        why = "the latents are the same, as no denoiser was treated"
        return effect.model_copy(update={"relative_l2": None, "not_measured": why})
    return effect


def capture_calls(
    pipe: Any, request: RunRequest, *, components: list[str] | None = None, positions: Sequence[int] | None = None
) -> list[DenoiserCall]:
    """Run the request and keep every denoiser call, in order. Holds all inputs in memory: for short runs.

    Args:
        components: names of the denoisers to watch; all by default.
        positions: of the samples that are run, in one batch; all samples, batch by batch, by default.
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
        stack.enter_context(_no_bar(pipe))
        for batch in request.batches() if positions is None else [positions]:
            run_batch(pipe, request, batch)
    return calls


def _copied(value: Any) -> Any:
    return value.detach().clone() if torch.is_tensor(value) else value


def _estimate(pipe: Any, request: RunRequest, budget_seconds: float) -> float:
    """Seconds that a request will take, from a few steps: of one sample, again when warm, of all when that helps."""
    expected = float("inf")
    for number, seeds in enumerate((request.seeds[:1], request.seeds[:1], request.seeds)):
        probe = request.model_copy(update={"seeds": seeds, "num_inference_steps": PROBE_STEPS})
        started = time.perf_counter()
        sample(pipe, probe)
        elapsed = time.perf_counter() - started
        all_samples = elapsed * len(request.seeds) / len(seeds)
        expected = min(expected, all_samples / PROBE_STEPS * request.num_inference_steps)
        hopeless = elapsed if number == 0 else all_samples  # the first time also pays for what is set up once
        if expected <= budget_seconds / 2 or hopeless > budget_seconds / 2:
            break
    return expected


def _unmeasured(why: str, reporter: Reporter) -> Effect:
    reporter.notice(f"the effect on images was not measured: {why}.")
    return Effect(not_measured=why)


def _denoisers_differ(first: Any, second: Any) -> bool:
    """Whether any denoiser of two pipelines holds other tensors."""
    pairs = zip(denoisers(first).values(), denoisers(second).values(), strict=True)
    return any(not _same_tensors(one.state_dict(), other.state_dict()) for one, other in pairs)


def _same_tensors(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def _refused(error: ValueError, pipe: Any, request: RunRequest) -> ConfigError | None:
    """Some pipelines refuse a size, some schedulers a number of steps; every other ValueError is a bug."""
    said, steps = str(error), request.num_inference_steps
    if (request.height or request.width) and "height" in said:
        return ConfigError(f"the pipeline refuses this size: {said}.", mend="Choose another --height and --width.")
    if "num_inference_steps" in said and str(steps) in said:
        most = pipe.scheduler.config.get("num_train_timesteps") or steps
        mend = f"Choose at most {most} with --steps." if steps > most else "Choose another number with --steps."
        return ConfigError(f"{type(pipe.scheduler).__name__} refuses {steps} steps: {said.rstrip('.')}.", mend=mend)
    return None


def _tell_other_size(images: Tensor, request: RunRequest, reporter: Reporter) -> None:
    """Some pipelines round a size to what their latents allow."""
    made = tuple(images.shape[-2:])
    asked = (request.height or made[0], request.width or made[1])
    if made != asked:
        reporter.notice(
            f"images of {asked[1]} x {asked[0]} pixels were asked for; the pipeline makes {made[1]} x {made[0]}"
        )


def _as_images(output: Any) -> Tensor:
    """Images of a pipeline output as (N, C, H, W) float32 in [0, 1], clips as (N, F, C, H, W): tensors, arrays with the
    channels last, or PIL images."""
    images = output.images if hasattr(output, "images") else output.frames if hasattr(output, "frames") else output[0]
    if isinstance(images, list):
        images = numpy.stack([numpy.asarray(image) for image in images])
        images = images[..., None] if images.ndim == 3 else images  # grayscale
    if isinstance(images, numpy.ndarray):
        scale = 255.0 if images.dtype == numpy.uint8 else 1.0
        images = torch.from_numpy(images).movedim(-1, -3) / scale
    tensor: Tensor = images
    return tensor.detach().float().cpu().clamp(0, 1)


@contextmanager
def _no_bar(pipe: Any) -> Iterator[None]:
    """Switch the pipeline's own progress bar off."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe._progress_bar_config = before
