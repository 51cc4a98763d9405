"""Watch a calibration run from outside: what its denoisers were given and what they answered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map

from dacc import CalibrateConfig, calibrate_pipeline
from dacc.core.pipeline import denoisers
from dacc.runtime import load
from dacc.runtime.clockwork import attach_clock


def copied(value: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if torch.is_tensor(leaf) else leaf, value)


def equal(one: Any, other: Any) -> bool:
    """Whether two trees are the same, tensors bit for bit and of one type."""
    (leaves, shape), (others, other_shape) = tree_flatten(one), tree_flatten(other)
    return shape == other_shape and all(
        left.dtype == right.dtype and torch.equal(left, right) if torch.is_tensor(left) else left == right
        for left, right in zip(leaves, others, strict=True)
    )


@dataclass(frozen=True)
class Seen:
    """One evaluation of a denoiser."""

    component: str
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    output: torch.Tensor


@dataclass
class Watch:
    """Set `scheduler` before a run; read `pipe` and `seen` after it. The first entries are those of the look ahead."""

    scheduler: type | None = None
    before: Callable[[Any], None] | None = None  # changes the loaded pipeline
    pipe: Any = None
    seen: list[Seen] = field(default_factory=list)

    def answer_to(self, call: Any) -> torch.Tensor:
        """What the denoiser answered in the pipeline to the very inputs of a stored call."""
        found = [
            seen.output
            for seen in self.seen
            if seen.component == call.component and equal(seen.inputs, (call.args, call.kwargs))
        ]
        assert found, f"nothing of the kind entered {call.component}"
        return found[0]

    def replay(self, call: Any) -> torch.Tensor:
        return first_of(call.replay(self.pipe.components[call.component]))


def first_of(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output.sample


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Hooks of our own on every pipeline that is loaded."""
    watch, load_source = Watch(), load.load_source

    def loaded(*arguments: Any, **options: Any) -> Any:
        pipe = load_source(*arguments, **options)
        if watch.scheduler:
            pipe.scheduler = watch.scheduler.from_config(pipe.scheduler.config)
            attach_clock(pipe)
        if watch.before:
            watch.before(pipe)
        for name, module in denoisers(pipe).items():

            def look(_: Any, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                watch.seen.append(Seen(name, copied((args, kwargs)), first_of(output).clone()))

            module.register_forward_hook(look, with_kwargs=True)
        watch.pipe, watch.seen = pipe, []
        return pipe

    monkeypatch.setattr(load, "load_source", loaded)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # no test pulls the plug
    return watch


@pytest.fixture
def calibrated(watch: Watch, tmp_path: Path) -> Callable[..., Path]:
    """Makes small sets: `calibrated(source, samples=4)`; options of the function begin with an underscore."""

    def make(source: Any, *, _output: str = "set", **fields: Any) -> Path:
        options = {name.removeprefix("_"): fields.pop(name) for name in list(fields) if name.startswith("_")}
        config = CalibrateConfig(**{"samples": 3, "batch_size": 2, "steps": 6, "timesteps": 3, **fields})
        return calibrate_pipeline(source, config, output=tmp_path / _output, device="cpu", **options)

    return make


@pytest.fixture(scope="session")
def made_set(unet_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of the unconditional pipeline: 3 samples in 2 batches, 3 of 6 calls; not to be changed."""
    config = CalibrateConfig(samples=3, batch_size=2, steps=6, timesteps=3)
    return calibrate_pipeline(unet_folder, config, output=tmp_path_factory.mktemp("sets") / "made", device="cpu")
