"""The loss that the network was trained with, on samples that it makes itself.

A clean sample is what the network predicts at the lowest noise level that the calibration set holds of it. Fresh noise
is added at the levels of the set's other calls, and the loss is the squared error of the network against that noise.
The network's own output would not do as the target: there the loss is 0, and so is its gradient.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..core.errors import UnsupportedError
from ..core.reporter import Reporter
from ..core.seeds import named_seed
from ..runtime.clock import fixed_run
from ..runtime.trajectory import DenoiserCall
from .frames import noisy_part, with_noisy_part
from .teacher import Teacher, prediction


def task_gradients(
    teacher: Teacher, weights: Mapping[str, nn.Parameter], seed: int, reporter: Reporter
) -> list[tuple[float, dict[str, float]]]:
    """For every noise level the mean loss, and of each weight the sum of its values times their gradients.

    Raises:
        UnsupportedError: the calls do not tell their noise levels, or the scheduler scales inputs in a way of its own.
    """
    if not teacher.noise.is_plain:
        raise UnsupportedError(
            "the scheduler is of the EDM kind, which scales inputs and outputs in a way of its own.",
            "This score adds noise to samples, and has to know how they enter the denoiser.",
            "Use --set score=out_mse.",
        )
    found: dict[int, tuple[list[float], dict[str, float]]] = {}
    parameters = list(weights.values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        for call, clean in reporter.progress(_noisy_calls(teacher), "scoring", len(teacher.calls)):
            assert call.state is not None
            loss = _loss(teacher, call, clean, seed)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            losses, totals = found.setdefault(call.state.call, ([], dict.fromkeys(weights, 0.0)))
            losses.append(loss.item())
            for name, parameter, gradient in zip(weights, parameters, gradients, strict=True):
                if gradient is not None:
                    totals[name] += (parameter.detach() * gradient).double().sum().item()
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    return [(sum(losses) / len(losses), totals) for losses, totals in found.values()]


def _noisy_calls(teacher: Teacher) -> list[tuple[DenoiserCall, Tensor]]:
    """Every call with the clean sample of its rows."""
    last: dict[tuple[int, int], DenoiserCall] = {}
    for call in teacher.calls:
        if call.state is None or call.state.sigma is None:
            raise UnsupportedError(
                "the calls of the calibration set do not tell their noise levels, which this score needs.",
                mend="Use --set score=out_mse.",
            )
        key = (call.state.run, call.state.evaluation)
        before = last.get(key)
        if before is None or _level(call) < _level(before):
            last[key] = call
    clean = {key: _clean(teacher, call) for key, call in last.items()}
    return [(call, clean[call.state.run, call.state.evaluation]) for call in teacher.calls if call.state]


def _clean(teacher: Teacher, call: DenoiserCall) -> Tensor:
    output = prediction(call, call.replay(teacher.denoiser))
    return teacher.noise.clean(noisy_part(call, teacher.layout, output), output, _level(call))


def _loss(teacher: Teacher, call: DenoiserCall, clean: Tensor, seed: int) -> Tensor:
    assert call.state is not None
    generator = torch.Generator().manual_seed(named_seed(seed, f"{call.state.run}/{call.state.call}"))
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    level = _level(call)
    noisy = with_noisy_part(call, teacher.layout, teacher.noise.mixed(clean, noise, level))
    with torch.enable_grad(), fixed_run(noisy.state):
        output = teacher.denoiser(*noisy.args, **noisy.kwargs)
    return (prediction(noisy, output) - teacher.noise.wanted(clean, noise, level)).square().mean()


def _level(call: DenoiserCall) -> float:
    assert call.state is not None
    assert call.state.sigma is not None
    return call.state.sigma
