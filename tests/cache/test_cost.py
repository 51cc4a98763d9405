from __future__ import annotations

from typing import Any

import torch

from dacc.cache import cost
from dacc.cache.capture import capture
from dacc.cache.cost import feature_costs
from dacc.core.reporter import silent
from dacc.runtime.request import RunRequest

from ..runtime.cache_plans import CUT, plan_for

REQUEST = RunRequest(seeds=(1, 2), num_inference_steps=3)


def entering_up_blocks(pipe: Any) -> list[torch.Tensor]:
    """What the cut keeps, call by call: what enters the last layer of the last up block from below."""
    seen: list[torch.Tensor] = []
    block = pipe.unet.up_blocks[-1]
    handle = block.resnets[-1].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    capture(pipe, "unet", REQUEST, (0, 1))
    handle.remove()
    return seen


def test_the_cost_of_features_is_their_distance(unet_pipeline):
    pipe = unet_pipeline()
    plan = plan_for(pipe, {CUT: "CRR"})
    found = feature_costs(pipe, "unet", plan, REQUEST, silent())["deep"]
    width = pipe.unet.up_blocks[-1].resnets[-1].in_channels - pipe.unet.config.block_out_channels[0]
    kept = [value[:, :width].double() for value in entering_up_blocks(pipe)]
    for first in range(3):
        for call in range(3):
            wanted = (kept[call] - kept[first]).abs().sum().item() if call >= first else 0.0
            assert abs(found[first][call] - wanted) <= 1e-3 * max(wanted, 1)


def test_guidance_may_end_before_the_run_does(unet_pipeline, monkeypatch):
    pipe = unet_pipeline()
    plan = plan_for(pipe, {CUT: "CRR"})
    alone = feature_costs(pipe, "unet", plan, REQUEST, silent())["deep"]
    batches = cost.capture_batches

    def guided(*arguments: Any) -> Any:
        for share, calls in batches(*arguments):
            yield share, [calls[0] * 2, calls[1] * 2, calls[2]]

    monkeypatch.setattr(cost, "capture_batches", guided)
    found = feature_costs(pipe, "unet", plan, REQUEST, silent())["deep"]
    twice = [[0.0, 2 * alone[0][1], alone[0][2]], [0.0, 0.0, alone[1][2]], [0.0] * 3]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(twice))
