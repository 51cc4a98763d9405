"""The run: which samples go to the pipeline together, and what enters its denoisers at the calls that are kept.

Nothing is cut out of a batch: a record is one denoiser call of a whole batch, with the arguments that the pipeline
gave, guidance branches as they came. Which axis of which argument counts samples is thus nobody's guess, and no input
can be labelled with a timestep that it did not have.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from torch import Tensor, nn

from ..core.errors import CalibrationError, ConfigError, UnsupportedError
from ..core.pipeline import denoisers
from ..core.reporter import Reporter
from ..core.schedule_id import ScheduleId, schedule_id
from ..core.seeds import seed_stream
from ..runtime.clock import current_run, running_scheduler
from ..runtime.request import RunRequest, tell_of_prompts
from ..runtime.trajectory import call_pipeline
from .arguments import Packer
from .config import STRATEGIES, CalibrateConfig
from .pictures import Pictures
from .store import SetWriter

Watcher = Callable[[str, tuple[Any, ...], dict[str, Any]], None]


@dataclass(frozen=True)
class Batch:
    """Samples that run together."""

    samples: tuple[int, ...]  # positions
    calls: tuple[int, ...]  # kept, ascending

    @property
    def name(self) -> str:
        """Its name in the journal."""
        return f"samples {self.samples} at {self.calls}"


@dataclass(frozen=True)
class Collected:
    """What was run; the values themselves lie in the writer's journal."""

    request: RunRequest
    schedule: ScheduleId
    batches: list[Batch]


class _Enough(Exception):
    """All that is kept of this run has been seen."""


def collect(
    pipe: Any,
    config: CalibrateConfig,
    components: Sequence[str],
    writer: SetWriter,
    reporter: Reporter,
    files: Sequence[Path] = (),
) -> Collected:
    """Run all batches that the journal lacks.

    Args:
        pipe: in full precision, with the clock attached.
        config: with its defaults filled in.
        files: pictures that take the place of what runs would draw.

    Raises:
        ConfigError: the pipeline does not take what was asked, or not even one batch fits the budget.
        CalibrationError: NaN or infinity entered a denoiser, or nothing was kept.
        UnsupportedError: an argument that cannot be stored, or a pipeline without steps.
    """
    request = _request(config)
    pictures = Pictures(pipe, files, request) if files else None
    schedule = find_schedule(pipe, request, components)
    _tell_defaults(pipe, config, request, len(schedule.timesteps), reporter)

    def run(batch: Batch) -> None:
        if batch.name not in writer.finished_units():
            record_batch(pipe, request, batch, components, config.store_dtype, writer, pictures)

    batches = plan_batches(config, schedule)
    largest = max(batches, key=lambda batch: len(batch.samples))
    run(largest)
    samples = _affordable(config, writer.unit_bytes(largest.name) / len(largest.samples), writer, reporter)
    if samples < config.samples:
        request = request.model_copy(update={"seeds": request.seeds[:samples]})
        batches = plan_batches(config.model_copy(update={"samples": samples}), schedule)
    if files and len(files) < len(request.seeds):
        reporter.notice(
            f"{len(files)} pictures are shared by {len(request.seeds)} samples, which differ in noise alone: what is "
            "trained on this set is judged by pictures that it has seen"
        )
    todo = [batch for batch in batches if batch.name not in writer.finished_units()]
    for batch in reporter.progress(todo, "calibrating"):
        run(batch)
    _check_components(components, batches, writer, reporter)
    return Collected(request, schedule, batches)


def plan_batches(config: CalibrateConfig, schedule: ScheduleId) -> list[Batch]:
    """Samples that keep the same calls, in groups of at most `batch_size`. Fewer samples draw the same calls."""
    strategy, random = STRATEGIES.load(config.strategy), Random(f"{config.strategy}/{config.seed}")
    kept = strategy.kept_calls(len(schedule.timesteps), config.samples, config.strategy_config(), random)
    groups: dict[tuple[int, ...], list[int]] = {}
    for sample, calls in enumerate(kept):
        groups.setdefault(calls, []).append(sample)
    size = config.batch_size
    return [
        Batch(tuple(samples[start : start + size]), calls)
        for calls, samples in sorted(groups.items())
        for start in range(0, len(samples), size)
    ]


def find_schedule(pipe: Any, request: RunRequest, components: Collection[str]) -> ScheduleId:
    """The grid that a run of the request visits, seen at the first call of one sample."""
    found: list[ScheduleId] = []

    def look(*_: Any) -> None:
        if scheduler := running_scheduler(pipe):
            found.append(schedule_id(scheduler))

    _run_until(lambda: bool(found), look, pipe, request, [0], components)
    if not found:
        raise UnsupportedError(f"{type(pipe).__name__} did not call {' or '.join(components)} in a scheduler's run.")
    return found[0]


def record_batch(
    pipe: Any,
    request: RunRequest,
    batch: Batch,
    components: Collection[str],
    store_dtype: str,
    writer: SetWriter,
    pictures: Pictures | None = None,
) -> None:
    """Run one batch up to its last kept call and save what entered the denoisers."""
    packer = Packer(store_dtype)
    records: list[dict[str, Any]] = []
    truth: tuple[Tensor, Tensor] | None = None  # about the coming call
    run: int | None = None  # of the scheduler whose calls we count; pipelines in two stages have another before

    def keep(component: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal run
        state = current_run()
        if state is None:
            raise UnsupportedError(f"{component} of {type(pipe).__name__} was called outside of a scheduler's run.")
        run = state.run
        if state.call in batch.calls:
            where = f"of call {state.call} of {component}"
            facts = {name: value for name, value in asdict(state).items() if name != "run"}
            inputs = [packer.pack(value, f"argument {index} {where}") for index, value in enumerate(args)]
            named = [[name, packer.pack(value, f"argument {name!r} {where}")] for name, value in kwargs.items()]
            known = {"truth": packer.pack(truth, f"a picture {where}")} if truth else {}
            records.append({"component": component, "state": facts, "args": inputs, "kwargs": named, **known})

    def put_pictures(sample: Tensor) -> None:
        nonlocal truth
        assert pictures is not None
        truth = pictures.noised_(sample, positions=batch.samples)

    def done() -> bool:
        state = current_run()
        return state is not None and state.run == run and state.call >= batch.calls[-1]

    _run_until(done, keep, pipe, request, batch.samples, components, put_pictures if pictures else None)
    if not records:
        raise CalibrationError(
            f"{' and '.join(components)} were not called at {batch.calls} of the run.",
            mend="Use more --timesteps or another --strategy.",
        )
    writer.save_unit(batch.name, packer.tensors, {**asdict(batch), "records": records})


def _run_until(
    done: Callable[[], bool],
    watch: Watcher,
    pipe: Any,
    request: RunRequest,
    samples: Sequence[int],
    components: Collection[str],
    change: Callable[[Tensor], None] | None = None,
) -> None:
    """Run some samples, watch what enters the denoisers, and stop after the scheduler step at which we are done.

    Args:
        change: what to do to the sample after every other step.
    """

    def hook(component: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watch(component, args, kwargs)

    def on_step(sample: Tensor) -> None:
        if done():
            raise _Enough
        if change:
            change(sample)

    with ExitStack() as stack:
        stack.enter_context(suppress(_Enough))
        for name, module in denoisers(pipe).items():
            if name in components:
                handle = module.register_forward_pre_hook(partial(hook, name), with_kwargs=True)
                stack.callback(handle.remove)
        call_pipeline(pipe, request, samples, on_step=on_step)


def _request(config: CalibrateConfig) -> RunRequest:
    negative = config.negative_prompt
    assert config.steps is not None, "the config is resolved first"
    return RunRequest(
        seeds=seed_stream("calibration", config.seed, config.samples),
        num_inference_steps=config.steps,
        guidance_scale=config.guidance_scale,
        class_labels=config.class_labels,
        prompts=config.prompts,
        negative_prompt=negative if isinstance(negative, str) else None,
        negative_prompts=None if isinstance(negative, str) else negative,
        height=config.height,
        width=config.width,
        num_frames=config.num_frames,
        batch_size=config.batch_size,
    )


def _tell_defaults(pipe: Any, config: CalibrateConfig, request: RunRequest, calls: int, reporter: Reporter) -> None:
    tell_of_prompts(pipe, request, reporter)
    if config.timesteps is not None and config.timesteps > calls:
        reporter.say(f"the run has {calls} calls, fewer than {config.timesteps}: all are kept")


def _affordable(config: CalibrateConfig, sample_bytes: float, writer: SetWriter, reporter: Reporter) -> int:
    """How many samples fit the budget, in whole batches where that is not all; also looks at the disk."""
    budget, batch = config.budget_gb * 1e9, min(config.batch_size, config.samples)
    samples = config.samples
    if sample_bytes * samples > budget:
        samples = int(budget / sample_bytes) // batch * batch
        if not samples:
            raise ConfigError(
                f"a batch of {batch} samples takes {batch * sample_bytes / 1e9:.3g} GB, "
                f"--budget-gb is {config.budget_gb:g}.",
                mend="Give a larger --budget-gb, fewer --timesteps, a smaller --batch-size, or --store-dtype bfloat16.",
            )
        reporter.notice(
            f"{config.samples} samples would take {sample_bytes * config.samples / 1e9:.3g} GB: "
            f"only {samples} are run, to keep to --budget-gb {config.budget_gb:g}"
        )
    writer.check_disk(int(sample_bytes * samples) - sum(map(writer.unit_bytes, writer.finished_units())))
    return samples


def _check_components(
    components: Sequence[str], batches: Sequence[Batch], writer: SetWriter, reporter: Reporter
) -> None:
    seen = {entry["component"] for batch in batches for entry in writer.unit_record(batch.name)["records"]}
    for name in components:
        if name not in seen:
            reporter.notice(f"{name} was not called at any of the kept calls: nothing is known of it")
