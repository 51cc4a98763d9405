"""The heavy part of `dacc prune`: one component after the other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from ..calibrate.inputs import calibration_of
from ..calibrate.store import CalibrationSet
from ..core.bundle import BundleWriter
from ..core.errors import ModelError, UnsupportedError
from ..core.manifest import ConfigChange, PruningRecord
from ..core.reporter import Reporter
from ..core.safe_read import read_json, resolve_shards
from ..core.tensor_file import StoredTensor, stored_tensors
from ..core.treatable import identity_config
from ..runtime.load import pick_device
from ..runtime.passthrough import bypass_
from ..runtime.skeleton import build_skeleton, passed_over
from ..runtime.trajectory import DenoiserCall
from .api import Job, calibration_config
from .config import METHODS
from .decide import Decision, decide
from .guidance import guidance_of, has_branches
from .noise import Noise, noise_of
from .recovery.taps import placed
from .remap import index_map, sources_of
from .remove import Removal
from .retrain import retrained
from .settings import MaskConfig
from .sources import refuse_other_residuals
from .teacher import Teacher, some_of


@dataclass(frozen=True)
class Pruned:
    """One component without the blocks that go."""

    record: PruningRecord
    bytes_before: int
    latency_ms: dict[str, float] | None
    recovery_cpu_seconds: float | None


def refuse_checkpointing(job: Job) -> None:
    """Where networks that are to be trained cannot compute their inner values twice.

    Raises:
        UnsupportedError: see above.
    """
    if not job.recovery.gradient_checkpointing:
        return
    for name in job.components:
        skeleton: Any = build_skeleton(job.source.path / name)
        if not skeleton._supports_gradient_checkpointing:
            raise UnsupportedError(
                f"diffusers has no gradient checkpointing for a {type(skeleton).__name__}.",
                mend="Leave --set gradient_checkpointing=true out; --set trainable=lora needs less memory too.",
            )


def calibration_for(job: Job, device: str, reporter: Reporter) -> CalibrationSet | None:
    """What the units are judged on, and the rest is trained on; None where nothing is."""
    if not job.running:
        return None
    weights, made = {name: job.hashes[name] for name in job.running}, calibration_config(job)
    return calibration_of(job.source, weights, made, job.calibration, device=device, reporter=reporter)


def prune_component(
    job: Job,
    name: str,
    writer: BundleWriter,
    calibration: CalibrationSet | None,
    device: str,
    reporter: Reporter,
) -> Pruned:
    """Write one component without some of its blocks."""
    folder, whole = job.source.path / name, whole_of(job, name, calibration, device)
    decision = choose(job, name, whole, JournalledScores(writer, name), reporter)
    skeleton = build_skeleton(folder)
    stored = stored_tensors(folder)
    skeleton._fix_state_dict_keys_on_load(stored)  # type: ignore[operator]  # names of old attention blocks
    small = smaller(skeleton, decision.removal)
    cut = remapped(stored, small, decision.removal, f"{name} of {job.source.name}")
    tensors: Mapping[str, StoredTensor | Tensor] = cut
    recovery = None
    if job.recovery.steps:
        tensors, recovery = retrained(
            whole.denoiser,
            cut,
            decision.removal,
            whole.calls,
            job.recovery,
            noise=whole.noise,
            seed=job.config.seed,
            checkpoint=writer.workplace(f"recovery-{name}"),
            reporter=reporter,
        )
    before: Any = skeleton.config
    config, changes = _written_config(read_json(folder / "config.json"), dict(before), decision.removal)
    writer.write_component(name, config, tensors, info=f"pruned by {job.config.method}")
    names = [path for path, _ in skeleton.named_modules()]
    record = PruningRecord(
        method=job.config.method,
        keep=decision.removal.keep,
        identity_modules=decision.removal.identity,
        config=changes,
        index_map=index_map(names, decision.removal.keep, decision.removal.removed),
        units=decision.units,
        parameters_before=decision.parameters,
        parameters_after=sum(parameter.numel() for parameter in small.parameters()),
        error=decision.error,
        additivity=decision.additivity,
        recovery=recovery.record if recovery else None,
    )
    size = sum(file.stat().st_size for file in resolve_shards(folder).values())
    return Pruned(record, size, decision.latency_ms, recovery.cpu_seconds if recovery else None)


@dataclass(frozen=True)
class Whole:
    """A denoiser before anything is removed."""

    denoiser: nn.Module  # float32; without weights where it need not run
    calls: Sequence[DenoiserCall]  # what enters it, on the CPU
    guidance_scale: float | None  # of these calls; None: not known
    noise: Noise


def whole_of(job: Job, name: str, calibration: CalibrationSet | None, device: str) -> Whole:
    """One component, loaded where it has to run."""
    folder, noise = job.source.path / name, noise_of(job.source.path)
    if calibration is None or name not in job.running:
        return Whole(build_skeleton(folder), [], None, noise)
    calls = list(calibration.of(name, dtype=torch.float32))  # as the network is
    denoiser: Any = load_denoiser(build_skeleton(folder), folder, device)
    guidance_scale = guidance_of(calibration.record, distilled=bool(denoiser.config.get("guidance_embeds")))
    return Whole(denoiser, calls, guidance_scale, noise)


def choose(
    job: Job, name: str, whole: Whole, known: MutableMapping[str, dict[str, float]], reporter: Reporter
) -> Decision:
    """What goes from one component."""
    teacher: Teacher | None = None
    if name in job.scored:
        if whole.guidance_scale is None and has_branches(whole.calls):
            reporter.notice(
                f"the guidance scale of the calibration set is not known: branches of {name} are judged apart; "
                "dacc calibrate --guidance-scale tells it"
            )
        calls = [placed(call, whole.denoiser) for call in _judging(job, whole.calls)]
        teacher = Teacher(whole.denoiser, calls, whole.guidance_scale, whole.noise)
    before: Any = whole.denoiser.config
    method = METHODS.load(job.config.method)
    decision = decide(whole.denoiser, job.config, method, job.settings, teacher, known, reporter)
    refuse_other_residuals(job.source, job.classes[name], before, decision.removal)
    return decision


def _judging(job: Job, calls: Sequence[DenoiserCall]) -> Sequence[DenoiserCall]:
    """The calls that units are judged on: a set that is trained on has more than that takes. Masks are trained too."""
    settings = job.settings
    return calls if isinstance(settings, MaskConfig) else some_of(calls, settings.samples, settings.timesteps)


def load_denoiser(skeleton: nn.Module, folder: Any, device: str) -> nn.Module:
    """The network of a component with its weights in float32."""
    loader: Any = type(skeleton)
    model: nn.Module = loader.from_pretrained(folder, dtype=torch.float32, local_files_only=True, use_safetensors=True)
    return model.eval().requires_grad_(False).to(pick_device(device))


def smaller(skeleton: nn.Module, removal: Removal) -> nn.Module:
    """The network that is left, on the meta device."""
    with init_empty_weights():
        model: nn.Module = type(skeleton).from_config(removal.config)  # type: ignore[attr-defined]
    bypass_(model, removal.identity)
    return model


def remapped(
    stored: dict[str, StoredTensor], small: nn.Module, removal: Removal, where: str
) -> dict[str, StoredTensor]:
    """The tensors of the result under their new names, checked against the network that is to hold them.

    Raises:
        ModelError: the weight files lack some, or hold others.
    """
    sources = sources_of(list(stored), removal.keep, removal.removed, removal.copies)
    wanted = {name: tuple(value.shape) for name, value in small.state_dict().items()}
    for new in passed_over(small, sources.keys() - wanted.keys()):
        del sources[new]
    found = {new: stored[old].shape for new, old in sources.items()}
    wrong = {
        "missing": wanted.keys() - found.keys(),
        "left over": found.keys() - wanted.keys(),
        "of another shape": {name for name in found.keys() & wanted.keys() if found[name] != wanted[name]},
    }
    if told := [f"{min(names)} is {how}{_and_more(len(names) - 1)}" for how, names in wrong.items() if names]:
        raise ModelError(
            f"the weights of {where} do not fit its config: {'; '.join(told)}.",
            mend="Check the folder with diffusers' own from_pretrained.",
        )
    return {new: stored[old] for new, old in sources.items()}


def _and_more(count: int) -> str:
    return f", and {count} more" if count else ""


def _written_config(
    raw: dict[str, Any], before: dict[str, Any], removal: Removal
) -> tuple[dict[str, Any], dict[str, ConfigChange]]:
    """The new config.json, and its fields that changed."""
    plain = json.loads(json.dumps({key: before.get(key) for key in removal.config}))
    after = json.loads(json.dumps(removal.config))
    changes = {key: ConfigChange(before=plain[key], after=value) for key, value in after.items() if value != plain[key]}
    written = {key: value for key, value in raw.items() if key != "quantization_config"}
    written |= {key: change.after for key, change in changes.items()}
    if removal.identity:
        written["quantization_config"] = identity_config(removal.identity)
    return written, changes


class JournalledScores(MutableMapping[str, dict[str, float]]):
    """Scores of units that an interrupted run finds again."""

    def __init__(self, writer: BundleWriter, component: str) -> None:
        self._writer, self._prefix = writer, f"scores:{component}/"

    def __getitem__(self, unit: str) -> dict[str, float]:
        if self._prefix + unit not in self._writer.finished_units():
            raise KeyError(unit)
        return dict(self._writer.unit_record(self._prefix + unit))

    def __setitem__(self, unit: str, scores: dict[str, float]) -> None:
        self._writer.save_unit(self._prefix + unit, {}, scores)

    def __delitem__(self, unit: str) -> None:
        raise TypeError("what is found stays")

    def __iter__(self) -> Iterator[str]:
        names = self._writer.finished_units()
        return iter(sorted(name.removeprefix(self._prefix) for name in names if name.startswith(self._prefix)))

    def __len__(self) -> int:
        return sum(1 for _ in self)
