"""What a plan does and costs: runs with it beside those that compute everything, from the same noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ..core.cache_plan import CachePlan
from ..core.errors import UnsupportedError
from ..runtime.compare import relative_l2
from ..runtime.installed import no_cache
from ..runtime.plan import planned_macs
from ..runtime.request import RunRequest
from ..runtime.trajectory import call_pipeline
from .window import Window


def typical(errors: Tensor) -> float:
    """The geometric mean over samples: (S,) -> float.

    Of the few samples that choose between plans, one may become another picture with this plan and not with that; it
    would outweigh all others in their mean.
    """
    return float(errors.log().mean().exp())


class PlanObjective:
    """Error and multiply-accumulates of plans of the same units. The pipeline keeps the last one that was tried.

    Args:
        blank: a plan with these units that computes everything, of the denoiser's own calls as all that are tried.
        request: the samples, run in its batches.
        reference: the pipeline whose runs are what is wanted; None: the same one without a plan.
    """

    def __init__(
        self,
        pipe: Any,
        component: str,
        blank: CachePlan,
        window: Window,
        request: RunRequest,
        reference: Any | None = None,
    ) -> None:
        self._pipe, self._component, self._window, self._request = pipe, component, window, request
        self.blank, self._steps = blank, 0
        self.containers = window.install_(pipe, component, blank).containers
        with no_cache(pipe):
            self._wanted = self._final(reference or pipe)

    def error(self, plan: CachePlan, tables: dict[str, Tensor] | None = None) -> float:
        """What is typical of the relative L2 of the final samples of a plan of these units, see `typical`."""
        return typical(self.errors(plan, tables))

    def errors(self, plan: CachePlan, tables: dict[str, Tensor] | None = None) -> Tensor:
        """The relative L2 of every final sample: (S,); infinite where it is not finite."""
        self._window.install_(self._pipe, self._component, plan, tables)
        errors = relative_l2(self._wanted, self._final(self._pipe))
        return errors.nan_to_num(nan=math.inf, posinf=math.inf)  # nan would be neither better nor worse than any other

    def macs_ratio(self, plan: CachePlan) -> float:
        """Predicted multiply-accumulates of a run over those without plan; nothing is run."""
        return planned_macs(plan, self.containers) / (plan.macs.full * plan.calls)

    def _final(self, pipe: Any) -> Tensor:
        """The samples after the last step."""
        return torch.cat([self._final_of(pipe, positions) for positions in self._request.batches()])

    def _final_of(self, pipe: Any, positions: Sequence[int]) -> Tensor:
        """Those of one batch. What follows the last step in the pipeline is left out once the steps are known."""
        seen: list[Tensor] = []

        def watch(sample: Tensor) -> None:
            seen.append(sample)
            if len(seen) == self._steps:
                raise _LastStep

        with suppress(_LastStep):
            call_pipeline(pipe, self._request, positions, on_step=watch)
        if not seen:
            raise UnsupportedError(
                f"the scheduler of {type(pipe).__name__} made no step.", "Runs are compared by its samples."
            )
        self._steps = len(seen)
        return seen[-1][: len(positions)].detach().float().cpu()  # guidance may have doubled the batch


class _LastStep(Exception):
    """The final sample is there; the run may end."""
