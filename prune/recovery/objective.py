"""What training lowers: the weighted sum of all losses of one call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.errors import UnsupportedError
from ...runtime.trajectory import DenoiserCall
from ..noise import Noise
from ..teacher import prediction
from .config import RecoveryConfig
from .losses import feature_loss, output_loss
from .taps import Answer


@dataclass(frozen=True)
class Lesson:
    """One call, the teacher's answer to it, and where in the training it comes."""

    call: DenoiserCall
    teacher: Answer
    update: int
    seed: int  # for everything that is drawn


class Objective:
    """Outputs and features against the teacher, and outputs against pictures; what images are trained with.

    Args:
        noise: what the teacher predicts; None: nothing is learned from the noise in pictures.
    """

    def __init__(self, config: RecoveryConfig, noise: Noise | None = None) -> None:
        self.config, self.noise = config, noise

    def terms(self, student: Answer, lesson: Lesson) -> tuple[Tensor, dict[str, float]]:
        """The loss, and its parts without their weights, by name."""
        output = output_loss(student.output, lesson.teacher.output)
        total, told = self.config.output_weight * output, {"output": float(output.detach())}
        if student.features and self.config.feature_weight:
            feature = self.features(student, lesson)
            total, told["feature"] = total + self.config.feature_weight * feature, float(feature.detach())
        wanted = self.truth(student, lesson.call) if self.config.task_weight else None
        if wanted is not None:
            task = output_loss(prediction(lesson.call, student.output), wanted)
            total, told["task"] = total + self.config.task_weight * task, float(task.detach())
        return total, told

    def truth(self, student: Answer, call: DenoiserCall) -> Tensor | None:
        """What the network was once trained to give in this call; None where no picture stands behind it.

        Raises:
            UnsupportedError: the network gives another shape.
        """
        if call.truth is None or self.noise is None or call.state is None or call.state.sigma is None:
            return None
        given, wanted = prediction(call, student.output), self.noise.wanted(*call.truth, call.state.sigma)
        branches = len(given) // len(wanted)  # of guidance, one after the other
        wanted = torch.cat([wanted] * branches).to(given.device)
        if wanted.shape != given.shape:
            raise UnsupportedError(
                f"the denoiser gives {tuple(given.shape)}, its pictures are {tuple(wanted.shape)}.",
                mend="Give --set task_weight=0.",
            )
        return wanted

    def features(self, student: Answer, lesson: Lesson) -> Tensor:
        """The error inside."""
        return feature_loss(student.features, lesson.teacher.features, self.config.mask_std)

    def tensors(self) -> dict[str, Tensor]:
        """What an interrupted training needs to go on."""
        return {}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from there."""
