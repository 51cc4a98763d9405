"""Recovery of video denoisers: individual content and motion dynamics, after VDMini (2024, arXiv 2411.18375).

    content  mean over taps, clips and frames of ||h - h^||^2 / (||h||^2 + 1e-6)       frame by frame, never mixed
    motion   - mean D(x0^ + noise)        D: the adversary, x0^: the clean clip that the student predicts

The paper's text was not at hand: the losses' names and their purpose are the paper's, what stands here is our
reconstruction. D sees all frames in every other update and a few consecutive ones in between, so that one good still
frame cannot win.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...core.reporter import Reporter
from ...core.seeds import named_seed
from ...runtime.trajectory import DenoiserCall
from ..frames import PACKED, Layout, cut_frames, layout_of, noisy_part, timestep, with_noisy_part
from ..noise import Noise
from .adversary import Heads, first_stages, heads_loss, stage_features
from .config import RecoveryConfig
from .levels import NoiseLevels
from .objective import Lesson, Objective
from .taps import Answer, Feature

TINY = 1e-6
WINDOW = 4  # consecutive frames
NOISIEST = 10.0  # noise over signal: from noisier calls no clean clip can be guessed
LARGEST = 10.0  # times the gradient of the output error; a stronger adversary is halved


def content_loss(student: Sequence[Feature], teacher: Sequence[Feature], layout: Layout) -> Tensor:
    """Mean over taps of the mean relative error of single frames."""
    return torch.stack(
        [
            torch.stack(
                [_frame_errors(one, other, layout).mean() for one, other in zip(ours, theirs, strict=True)]
            ).mean()
            for ours, theirs in zip(student, teacher, strict=True)
        ]
    ).mean()


def _frame_errors(student: Tensor, teacher: Tensor, layout: Layout) -> Tensor:
    """(N, F)."""
    ours, theirs = (layout.by_frame(feature.float()).flatten(2) for feature in (student, teacher))
    return (ours - theirs).square().sum(-1) / (theirs.square().sum(-1) + TINY)


class VideoObjective(Objective):
    """Outputs, content and, with an adversary, motion.

    Args:
        adversary: None: no loss of motion.
    """

    def __init__(self, config: RecoveryConfig, teacher: nn.Module, adversary: Adversary | None) -> None:
        super().__init__(config)
        self.teacher, self.adversary = teacher, adversary

    def features(self, student: Answer, lesson: Lesson) -> Tensor:
        """The error inside, frame by frame."""
        layout = layout_of(self.teacher, lesson.call)
        assert layout is not None
        return content_loss(student.features, lesson.teacher.features, layout)

    def terms(self, student: Answer, lesson: Lesson) -> tuple[Tensor, dict[str, float]]:
        """The loss, and its parts without their weights, by name."""
        total, told = super().terms(student, lesson)
        if self.adversary:
            motion, more = self.adversary.term(student.output, lesson)
            total, told = total + motion, told | more
        return total, told

    def tensors(self) -> dict[str, Tensor]:
        """What an interrupted training needs to go on."""
        return self.adversary.tensors() if self.adversary else {}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from there."""
        if self.adversary and tensors:
            self.adversary.load(tensors)


class Adversary:
    """Heads on the frozen teacher, how they learn, and how much they are heard.

    Args:
        call: any call of the training.
        levels: from which new noise is drawn.
    """

    def __init__(
        self,
        config: RecoveryConfig,
        teacher: nn.Module,
        call: DenoiserCall,
        levels: NoiseLevels,
        noise: Noise,
        seed: int,
    ) -> None:
        self.config, self.teacher, self.levels, self.noise = config, teacher, levels, noise
        self.stages = first_stages(teacher)
        layout = layout_of(teacher, call)
        assert layout is not None
        with torch.no_grad():
            channels = [each.shape[2] for each in stage_features(teacher, self.stages, call, layout)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(named_seed(seed, "heads"))
            self.heads = Heads(channels).to(next(teacher.parameters()).device)
        self.optimizer = torch.optim.Adam(
            self.heads.parameters(), lr=config.adversarial_learning_rate, betas=(0.0, 0.99)
        )
        self.weight = config.adversarial_weight

    def term(self, output: Tensor, lesson: Lesson) -> tuple[Tensor, dict[str, float]]:
        """What the adversary adds to the loss, 0 before its time and for the noisiest calls. Its heads learn meanwhile.

        The gradient stops at the output: what is returned has that very gradient there.
        """
        nothing, state = output.new_zeros(()), lesson.call.state
        start = self.config.adversarial_start * self.config.steps
        if lesson.update < start / 2 or state is None or state.sigma is None:
            return nothing, {}
        if self.noise.ratio(state.sigma) > NOISIEST:
            return nothing, {}
        scene = _Scene(self, lesson, state.sigma)
        fooled = self._teach(scene, output, lesson.teacher.output)
        if lesson.update < start:
            return nothing, {"heads": fooled}
        loss = -self.heads.verdict(scene.features(output))
        (slope,) = torch.autograd.grad(loss, output)
        usual = 2 * (output.detach().float() - lesson.teacher.output.float())  # of the error, whatever its weight
        usual = usual / lesson.teacher.output.float().square().sum()
        if self.weight * slope.norm() > LARGEST * usual.norm():
            self.weight /= 2
        return self.weight * (output * slope).sum(), {"heads": fooled, "motion": float(loss.detach())}

    def tensors(self) -> dict[str, Tensor]:
        """Heads, their optimizer and the weight of what they say."""
        found = {f"heads {name}": value for name, value in self.heads.state_dict().items()}
        for number, parameter in enumerate(self.heads.parameters()):
            found |= {f"adam {number} {key}": value for key, value in self.optimizer.state[parameter].items()}
        return found | {"weight": torch.tensor(self.weight, dtype=torch.float64)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from there."""
        self.heads.load_state_dict({name: tensors[f"heads {name}"] for name in self.heads.state_dict()})
        for number, parameter in enumerate(self.heads.parameters()):
            prefix = f"adam {number} "
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if state:
                self.optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
                }
        self.weight = float(tensors["weight"])

    def _teach(self, scene: _Scene, fake: Tensor, real: Tensor) -> float:
        """One update of the heads; returns their loss before it."""
        with torch.no_grad():
            features = [scene.features(clip) for clip in (real.to(fake.dtype), fake)]
        loss = heads_loss(self.heads, *features)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


class _Scene:
    """How one call is shown to the adversary: which frames, at which new level, with which noise."""

    def __init__(self, adversary: Adversary, lesson: Lesson, level: float) -> None:
        self._adversary, self._call, self._level = adversary, lesson.call, level
        layout = layout_of(adversary.teacher, lesson.call)
        assert layout is not None
        self._layout = layout
        generator = torch.Generator().manual_seed(named_seed(lesson.seed, "scene"))
        at = timestep(lesson.call)
        time, self._new_level = adversary.levels.draw(generator, whole=not _is_float(at))
        self._at = torch.full_like(at, time) if isinstance(at, Tensor) else type(at)(time)
        self._noise = torch.randn(lesson.teacher.output.shape, generator=generator)
        # transformers may get positions for all frames, so only UNets see a part
        few = layout.frames > WINDOW and lesson.update % 2 == 1 and hasattr(adversary.teacher, "down_blocks")
        self._count = WINDOW if few else layout.frames
        self._first = int(torch.randint(layout.frames - self._count + 1, (), generator=generator))

    def features(self, output: Tensor) -> list[Tensor]:
        """What the heads see of the clean clip that `output` stands for, with gradients to it."""
        noisy = noisy_part(self._call, self._layout, output)
        clean = self._adversary.noise.clean(noisy, output, self._level)
        again = self._adversary.noise.mixed(clean, self._noise.to(clean), self._new_level)
        call, layout = with_noisy_part(self._call, self._layout, again, self._at), self._layout
        if self._count < layout.frames:
            call = cut_frames(call, layout, self._first, self._count)
            layout = replace(layout, frames=self._count)
        return stage_features(self._adversary.teacher, self._adversary.stages, call, layout)


def objective_for(
    config: RecoveryConfig,
    teacher: nn.Module,
    calls: Sequence[DenoiserCall],
    noise: Noise | None,
    seed: int,
    reporter: Reporter,
) -> Objective:
    """What this network is trained with; a notice where a video has to do without losses of its own."""
    layout = layout_of(teacher, calls[0])
    if config.task_weight and noise is None and any(call.truth for call in calls):
        reporter.notice("recovery does not learn from the noise in your pictures: it is not known how it was added.")
    if config.icmd and type(teacher).__name__ in PACKED:
        reporter.notice("recovery has the losses of images, as with icmd=false: clips enter as a plain list of tokens.")
    if layout is None or not config.icmd:
        return Objective(config, noise)
    if not config.adversarial_weight or layout.frames == 1:
        return VideoObjective(config, teacher, None)
    levels = NoiseLevels((call.state for call in calls), noise) if noise else None
    if not (levels and noise):
        why = "the calls name no noise levels" if noise else "it is not known what the denoiser predicts"
        reporter.notice(f"recovery goes without the adversary that looks at motion: {why}.")
        return VideoObjective(config, teacher, None)
    return VideoObjective(config, teacher, Adversary(config, teacher, calls[0], levels, noise, seed))


def _is_float(value: Any) -> bool:
    return value.is_floating_point() if isinstance(value, Tensor) else isinstance(value, float)
