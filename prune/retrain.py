"""What is left of a component is trained against the whole one, before it is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from ..core.reporter import Reporter
from ..core.tensor_file import StoredTensor, torch_dtype
from ..runtime.passthrough import bypass_
from ..runtime.trajectory import DenoiserCall
from .noise import Noise
from .recovery.config import RecoveryConfig
from .recovery.trainer import Recovery, recover
from .remove import Removal
from .taps import taps_of


def retrained(
    teacher: nn.Module,
    stored: Mapping[str, StoredTensor],
    removal: Removal,
    calls: Sequence[DenoiserCall],
    config: RecoveryConfig,
    *,
    noise: Noise,
    seed: int,
    checkpoint: Path,
    reporter: Reporter,
) -> tuple[dict[str, Tensor], Recovery]:
    """The tensors of the student after training, in the types that they are stored in, and how it was trained.

    Args:
        teacher: the whole denoiser, float32.
        stored: the student's tensors as they were cut.
        noise: what the denoiser predicts.
        checkpoint: a folder for this training alone.
    """
    student = _student(teacher, stored, removal)
    names = [name for name, _ in teacher.named_modules()]
    recovery = recover(
        student,
        teacher,
        calls,
        config,
        taps=taps_of(type(teacher).__name__, names, removal),
        seed=seed,
        checkpoint=checkpoint,
        reporter=reporter,
        noise=noise if noise.is_plain else None,
    )
    tensors = {
        name: value.detach().to("cpu", torch_dtype(stored[name].dtype)) for name, value in student.state_dict().items()
    }
    return tensors, recovery


def _student(teacher: nn.Module, stored: Mapping[str, StoredTensor], removal: Removal) -> nn.Module:
    """The network that is left, in float32 as it is built, where its teacher is."""
    student: nn.Module = type(teacher).from_config(removal.config)  # type: ignore[attr-defined]
    bypass_(student, removal.identity)
    student.load_state_dict({name: tensor.load() for name, tensor in stored.items()})
    weight = next(teacher.parameters())
    return student.to(weight.device)
