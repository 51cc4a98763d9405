"""What training lowers: the weighted sum of all losses of one call."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...runtime.trajectory import DenoiserCall
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
    """Outputs and features against the teacher; what images are trained with."""

    def __init__(self, config: RecoveryConfig) -> None:
        self.config = config

    def terms(self, student: Answer, lesson: Lesson) -> tuple[Tensor, dict[str, float]]:
        """The loss, and its parts without their weights, by name."""
        output = output_loss(student.output, lesson.teacher.output)
        total, told = self.config.output_weight * output, {"output": float(output.detach())}
        if student.features and self.config.feature_weight:
            feature = self.features(student, lesson)
            total, told["feature"] = total + self.config.feature_weight * feature, float(feature.detach())
        return total, told

    def features(self, student: Answer, lesson: Lesson) -> Tensor:
        """The error inside."""
        return feature_loss(student.features, lesson.teacher.features, self.config.mask_std)

    def tensors(self) -> dict[str, Tensor]:
        """What an interrupted training needs to go on."""
        return {}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from there."""
