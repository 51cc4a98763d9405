"""A small trainer: AdamW, an averaged copy of the weights, and checkpoints from which a run goes on exactly.

Randomness comes from one generator whose state is in the checkpoint, so a run that was stopped and taken up again
ends with the same bytes as one that was not.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class TrainConfig:
    name: str  # of the run: its folder under `work`
    steps: int
    batch_size: int
    learning_rate: float
    ema_decay: float = 0.998  # nearer 1: smoother weights, but the early, bad ones linger for longer
    weight_decay: float = 0.01
    warmup_steps: int = 200
    decay_fraction: float = 0.4  # share of the run, at its end, over which the rate falls to zero
    stop_step: int | None = None  # end here, before the schedule of `steps` does
    checkpoint_every: int = 250  # steps; more often: less lost when stopped, more time spent on writing
    bf16: bool = False  # autocast; pays for convolutions where the CPU has AVX512-BF16
    seed: int = 0
    device: str = "cpu"
    work: Path = REPOSITORY / ".work" / "zoo"

    @property
    def folder(self) -> Path:
        return self.work / self.name

    def rate_at(self, step: int) -> float:
        """Rise, stay, fall linearly. The flat middle lets a longer or shorter run share its beginning."""
        decay_steps = max(1, round(self.decay_fraction * self.steps))
        rise = (step + 1) / max(1, self.warmup_steps)
        fall = (self.steps - step) / decay_steps
        return self.learning_rate * min(1.0, rise, fall)


LossFunction = Callable[[nn.Module, torch.Generator], Tensor]


def parse_arguments(description: str, *, name: str, steps: int, batch_size: int) -> argparse.Namespace:
    """The options that all training scripts share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--work", type=Path, default=REPOSITORY / ".work" / "zoo", help="checkpoints go here")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "zoo" / name, help="the finished folder")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments


def shared_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of TrainConfig that all stages of a script share."""
    return {"seed": arguments.seed, "device": arguments.device, "work": arguments.work}


def train(
    model: nn.Module, loss_of: LossFunction, config: TrainConfig, export: Callable[[nn.Module], None]
) -> nn.Module:
    """Train `model`, resuming if a checkpoint is there; returns the averaged copy.

    `export` gets the averaged model at every checkpoint, so that a usable pipeline exists from early on.
    """
    model = model.to(config.device).train()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99)
    )
    generator = torch.Generator().manual_seed(config.seed)
    progress = _resume(model, average, optimizer, generator, config)
    started, started_cpu = time.perf_counter(), time.process_time()
    end = config.stop_step or config.steps
    bar = tqdm(
        range(progress["step"], end),
        desc=config.name,
        initial=progress["step"],
        total=end,
        mininterval=1 if sys.stderr.isatty() else 30,
    )
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = config.rate_at(step)
        with torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.bf16):
            loss = loss_of(model, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        _update_average_(average, model, min(config.ema_decay, (1 + step) / (10 + step)))
        progress["loss"] += 0.02 * (loss.item() - progress["loss"]) if step else loss.item()
        bar.set_postfix(loss=f"{progress['loss']:.4f}", refresh=False)
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == end:
            now, now_cpu = time.perf_counter(), time.process_time()
            progress["step"] = step + 1
            progress["seconds"] += now - started
            progress["cpu_seconds"] += now_cpu - started_cpu
            started, started_cpu = now, now_cpu
            _save(model, average, optimizer, generator, progress, config)
            export(average)
    return average


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write beside `folder`, then swap: whoever reads it meanwhile never sees half a pipeline for long."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.parent.mkdir(parents=True, exist_ok=True)
    write(fresh)
    for file in fresh.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)  # safetensors writes for the owner alone
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def _update_average_(average: nn.Module, model: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for kept, current in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(current)


def _settings(config: TrainConfig) -> dict[str, float]:
    """What a run must not change on its way; its length may change while the rate is still flat."""
    return {"seed": config.seed, "batch_size": config.batch_size, "learning_rate": config.learning_rate}


def _save(
    model: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    progress: dict[str, float],
    config: TrainConfig,
) -> None:
    config.folder.mkdir(parents=True, exist_ok=True)
    state = {
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generator": generator.get_state(),
        "global_rng": torch.get_rng_state(),
        "progress": progress,
        "settings": _settings(config),
    }
    unfinished = config.folder / "checkpoint.pt.new"
    torch.save(state, unfinished)
    unfinished.replace(config.folder / "checkpoint.pt")
    facts = {**progress, "batch_size": config.batch_size, "seed": config.seed, "threads": torch.get_num_threads()}
    (config.folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


def _resume(
    model: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    config: TrainConfig,
) -> dict[str, float]:
    path = config.folder / "checkpoint.pt"
    if not path.exists():
        return {"step": 0, "loss": 0.0, "seconds": 0.0, "cpu_seconds": 0.0}
    state = torch.load(path, map_location="cpu", weights_only=True)
    if (stored := state.get("settings", _settings(config))) != _settings(config):
        raise SystemExit(f"{path} was trained with {stored}, not {_settings(config)}; delete its folder to begin anew")
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    generator.set_state(state["generator"])
    torch.set_rng_state(state["global_rng"])
    return state["progress"]
