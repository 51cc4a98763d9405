"""Small networks that are cut, and calls of runs that never happened."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from dacc.core.config import build_config
from dacc.core.reporter import silent
from dacc.prune.recovery import trainer
from dacc.prune.recovery.config import RecoveryConfig
from dacc.prune.recovery.trainer import recover
from dacc.runtime.clock import RunState
from dacc.runtime.trajectory import DenoiserCall

WIDTH = 8


class FeedForward(nn.Module):
    """Named as in diffusers."""

    def __init__(self):
        super().__init__()
        self.net = nn.ModuleList([nn.Linear(WIDTH, 16), nn.SiLU(), nn.Linear(16, WIDTH)])

    def forward(self, x):
        for layer in self.net:
            x = layer(x)
        return x


class ResidualBlock(nn.Module):
    """A branch beside the identity."""

    def __init__(self):
        super().__init__()
        self.norm, self.ff = nn.LayerNorm(WIDTH), FeedForward()

    def forward(self, x):
        return x + self.ff(self.norm(x))


class Toy(nn.Module):
    """A denoiser of short sequences."""

    def __init__(self, depth):
        super().__init__()
        self.time, self.proj_in = nn.Linear(1, WIDTH), nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(ResidualBlock() for _ in range(depth))
        self.proj_out = nn.Linear(WIDTH, 4)

    def forward(self, sample, timestep):
        x = self.proj_in(sample) + self.time(timestep.view(-1, 1, 1) / 1000)
        for block in self.blocks:
            x = block(x)
        return (self.proj_out(x),)


def state_of(run: int, call: int, calls: int, sigma: float | None = 1.0) -> RunState:
    return RunState(-1 - run, call, calls, call, calls, 1000.0 * (calls - call) / calls, sigma)


def toy_calls(runs: int = 10, calls: int = 6) -> list[DenoiserCall]:
    generator = torch.Generator().manual_seed(5)
    found = []
    for run in range(runs):
        for call in range(calls):
            state = state_of(run, call, calls)
            sample = torch.randn(8, 3, 4, generator=generator)
            found.append(DenoiserCall("denoiser", state, (sample, torch.full((8,), state.timestep)), {}))
    return found


def cut(teacher: Toy, keep: tuple[int, ...]) -> Toy:
    student = copy.deepcopy(teacher)
    student.blocks = nn.ModuleList(student.blocks[number] for number in keep)
    return student


TAPS = (("blocks.0", "blocks.0"), ("blocks.1", "blocks.3"))


@pytest.fixture
def toy() -> Callable[[], tuple[Toy, Toy]]:
    """Makes a teacher of four blocks and a student of two."""

    def make():
        torch.manual_seed(0)
        teacher = Toy(4)
        return cut(teacher, (0, 3)), teacher

    return make


@pytest.fixture
def train(tmp_path) -> Callable[..., Any]:
    """Recovers; a name of its own for every checkpoint that is not to be found again."""

    def run(student, teacher, calls=None, *, taps=TAPS, seed=0, name="one", reporter=None, noise=None, **fields):
        config = build_config(RecoveryConfig, **{"steps": 40, "learning_rate": 5e-3} | fields)
        return recover(
            student,
            teacher,
            toy_calls() if calls is None else calls,
            config,
            taps=taps,
            seed=seed,
            checkpoint=tmp_path / name,
            reporter=reporter or silent(),
            noise=noise,
        ).record

    return run


@functools.cache
def _motion_unet(layers: int) -> Any:
    from diffusers import UNetMotionModel

    torch.manual_seed(0)
    return UNetMotionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        block_out_channels=(8, 16),
        layers_per_block=layers,
        norm_num_groups=4,
        cross_attention_dim=8,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
    ).eval()


@pytest.fixture
def motion_unet() -> Callable[..., Any]:
    """Makes tiny video UNets: `motion_unet(layers)`."""
    return lambda layers=1: copy.deepcopy(_motion_unet(layers))


@pytest.fixture
def clip_calls() -> Callable[..., list[DenoiserCall]]:
    """Calls of a video UNet, with conditions once for every frame."""

    def make(runs=2, calls=3, frames=6, clips=2):
        generator = torch.Generator().manual_seed(1)
        found = []
        for run in range(runs):
            for call in range(calls):
                state = state_of(run, call, calls, sigma=(4.0, 1.0, 0.3)[call])
                clip = torch.randn(clips, 4, frames, 8, 8, generator=generator)
                words = torch.randn(clips, 3, 8, generator=generator).repeat_interleave(frames, 0)
                args = (clip, torch.tensor(int(state.timestep)))
                found.append(DenoiserCall("unet", state, args, {"encoder_hidden_states": words, "return_dict": False}))
        return found

    return make


@pytest.fixture
def stopped_before() -> Callable[[int], AbstractContextManager[None]]:
    """`with stopped_before(5):` a training inside is interrupted before that update, and has saved all others."""

    @contextmanager
    def stop(update: int) -> Iterator[None]:
        usual = trainer._Run.update

        def failing(self: Any, training: Any) -> None:
            if training.done == update:
                raise KeyboardInterrupt
            usual(self, training)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "SAVE_SECONDS", 0.0)
            patch.setattr(trainer, "SAVE_SHARE", 0.0)
            patch.setattr(trainer._Run, "update", failing)
            with pytest.raises(KeyboardInterrupt):
                yield

    return stop
