"""A training on its way: weights, optimizer, average, best weights so far, and how all of it is kept on disk."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...core.journal import Journal
from .config import RecoveryConfig, Schedule

UNIT = "training"  # its name in the journal
WARM_UP = 0.02  # share of the steps in which the rate rises to its height
EARLY = 10  # updates after which the average begins to look back as far as it should


class Training:
    """Everything that changes.

    Args:
        parameters: what is trained, by name.
        error: of the student as it is, on calls that are not trained on.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], config: RecoveryConfig, rate: float, error: float
    ) -> None:
        self.parameters, self.config, self.rate = dict(parameters), config, rate
        groups = [
            {"params": [one for one in parameters.values() if one.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [one for one in parameters.values() if one.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=rate, fused=True)
        self.done, self.stale, self.stopped = 0, 0, ""
        self.least = self.error_before = error
        self.reached: float | None = None  # the least error of a check: not of the weights as they were at the start
        self.average = {name: one.detach().clone() for name, one in parameters.items()}
        self.best = {name: one.clone() for name, one in self.average.items()}
        self.cpu_seconds, self._counted = 0.0, time.process_time()
        self.sums: dict[str, float] = {}  # losses since the last check, by name
        self.counts: dict[str, int] = {}  # how many of each

    def step(self) -> None:
        """Change the weights by their gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * share_of_rate(self.done, self.config.steps, self.config.schedule)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        decay = min(self.config.ema, self.done / (self.done + EARLY))
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self.average[name].lerp_(parameter, 1 - decay)

    def note(self, losses: Mapping[str, float]) -> None:
        """Remember the losses of one call; not every call has all of them."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def losses(self) -> dict[str, float]:
        """Means since the last check."""
        return {name: total / self.counts[name] for name, total in self.sums.items()}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The network has the averaged weights meanwhile."""
        own = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.put(self.average)
        try:
            yield
        finally:
            self.put(own)

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        """Give the network other weights."""
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def save(self, journal: Journal, extra: Mapping[str, Tensor]) -> None:
        """Replace what was kept on disk."""
        now = time.process_time()
        self.cpu_seconds, self._counted = self.cpu_seconds + now - self._counted, now
        kinds: dict[str, Mapping[str, Tensor]] = {
            "weight": self.parameters,
            "average": self.average,
            "best": self.best,
            "extra": extra,
        }
        tensors = {f"{kind}/{name}": one.detach() for kind, table in kinds.items() for name, one in table.items()}
        for name, parameter in self.parameters.items():
            tensors |= {f"adam {key}/{name}": value for key, value in self.optimizer.state[parameter].items()}
        record = {name: getattr(self, name) for name in _PLAIN}
        journal.save(UNIT, {name: value.cpu().contiguous() for name, value in tensors.items()}, record)

    def load(self, journal: Journal) -> dict[str, Tensor]:
        """Go on where the last one was kept; nothing happens where there is none. Returns `extra`."""
        if UNIT not in journal.names():
            return {}
        tables: dict[str, dict[str, Tensor]] = {}
        for full, stored in journal.tensors(UNIT).items():
            kind, _, name = full.partition("/")
            tables.setdefault(kind, {})[name] = stored.load()
        self.put(tables["weight"])
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self.average[name].copy_(tables["average"][name])
                self.best[name].copy_(tables["best"][name])
                if state := self._adam(tables, name, parameter):  # weights without a gradient have none
                    self.optimizer.state[parameter] = state
        for name, value in journal.record(UNIT).items():
            setattr(self, name, value)
        self._counted = time.process_time()
        return tables.get("extra", {})

    def _adam(self, tables: Mapping[str, Mapping[str, Tensor]], name: str, parameter: Tensor) -> dict[str, Any]:
        # all of it beside its weights, the count too: the step is fused
        return {
            kind.removeprefix("adam "): table[name].to(parameter.device)
            for kind, table in tables.items()
            if kind.startswith("adam ") and name in table
        }


_PLAIN = ("done", "stale", "stopped", "least", "reached", "error_before", "sums", "counts", "cpu_seconds")


def share_of_rate(done: int, steps: int, schedule: Schedule) -> float:
    """What part of the learning rate the update after `done` others has."""
    rising = max(1, round(WARM_UP * steps))
    if done < rising:
        return (done + 1) / rising
    left = 1 - (done - rising) / max(1, steps - rising)
    return {"cosine": (1 - math.cos(math.pi * left)) / 2, "linear": left, "constant": 1.0}[schedule]
