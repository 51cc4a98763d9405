"""Learn the fixed activation scales of one unit against what the float network gives; the integers' zero points and the
weights stay as they are (learned step sizes: Esser et al., 2020, arXiv 1902.08153; in this form Q-Diffusion, Li et al.,
2023, arXiv 2302.04304).

Letters: S rows of a table, P parts of the channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..runtime.activation import ActivationScale
from .block import Block, Treated
from .simulate import channel_axis, rounding_of, row_now

CHECKS = 4  # times that the scales are judged while they are learned
NORM = 2.4  # of the loss


class LearnedScale(nn.Module):
    """Rounds activations with scales that have gradients: x^ = s (clip(round(x / s) + z, 0, 2^b - 1) - z).

    The logarithm of s is what is learned: a step has the same share of a small scale and of a large one.
    """

    def __init__(self, acts: ActivationScale, bits: int, axis: int, split: int | None) -> None:
        super().__init__()
        self.rows = nn.ParameterList(nn.Parameter(row.log()) for row in acts.scale)  # (P,) each
        self.zero_point, self.top, self.axis, self.split = acts.zero_point, 2**bits - 1, axis, split

    def forward(self, x: Tensor) -> Tensor:
        row = row_now(len(self.rows))
        sizes = [self.split, x.shape[self.axis] - self.split] if self.split else [x.shape[self.axis]]
        scales, zeros = self.rows[row].exp(), self.zero_point[row].float()
        parts = x.split(sizes, dim=self.axis)
        rounded = [self._part(part, scales[number], zeros[number]) for number, part in enumerate(parts)]
        return torch.cat(rounded, dim=self.axis) if self.split else rounded[0]

    def _part(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        codes = (round_straight(x / scale) + zero).clamp(0, self.top)
        return (codes - zero) * scale

    def result(self) -> ActivationScale:
        """The scales as they are now."""
        return ActivationScale(torch.stack([row.detach().exp() for row in self.rows]), self.zero_point)


def round_straight(x: Tensor) -> Tensor:
    """round(x) with the gradient of x."""
    return x + (x.round() - x).detach()


def learn_scales(block: Block, treated: dict[str, Treated], updates: int, learning_rate: float) -> dict[str, Treated]:
    """Better scales for the layers of a unit, whose quantized weights are at work.

    The best scales seen are kept; those at the start are among them. An error that a layer has is that of the unit, and
    follows them.

    Args:
        updates: each looks at one call.
        learning_rate: of Adam, falling to 0 along a cosine.
    """
    learned = {
        name: LearnedScale(found.acts, scheme.act_bits, channel_axis(block.layers[name]), scheme.split)
        for name, found in treated.items()
        if found.acts is not None and (scheme := found.weight.scheme)
    }
    best = {name: learner.result() for name, learner in learned.items()}
    if not learned or not updates or not block.sightings:
        return treated
    least = _error(block, treated, best)
    optimizer = torch.optim.Adam([row for learner in learned.values() for row in learner.rows], lr=learning_rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    generator = torch.Generator().manual_seed(block.seed)
    for update in range(updates):
        sighting = block.drawn(generator)
        assert sighting.target is not None
        optimizer.zero_grad()
        with block.rounding.instead(dict(learned)):
            outputs = block.run(sighting)
            loss = torch.stack([_distance(*pair) for pair in zip(outputs, sighting.target, strict=True)]).mean()
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        falling.step()
        if (update + 1) % max(1, updates // CHECKS) == 0:
            scales = {name: learner.result() for name, learner in learned.items()}
            if (found_error := _error(block, treated, scales)) < least:
                least, best = found_error, scales
    return {
        name: replace(
            found, acts=best.get(name, found.acts), output_error=None if found.output_error is None else least
        )
        for name, found in treated.items()
    }


def _distance(mine: Tensor, wanted: Tensor) -> Tensor:
    power: Callable[[Tensor], Tensor] = lambda values: values.abs().pow(NORM).mean()  # noqa: E731
    return power(mine - wanted) / power(wanted).clamp(min=1e-30)


def _error(block: Block, treated: dict[str, Treated], scales: dict[str, ActivationScale]) -> float:
    """Of the unit with these scales, rounded as the kernels do it."""
    ways = {
        name: rounding_of(found.weight.scheme, block.layers[name], scales.get(name)) for name, found in treated.items()
    }
    with block.rounding.instead(ways):
        return block.error()
