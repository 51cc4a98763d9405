import time
from types import SimpleNamespace

import pytest
import torch

from dacc.runtime.timing import measure_in_turns


def test_actions_take_turns_after_one_warm_up_each() -> None:
    order: list[str] = []
    actions = [lambda name=name: order.append(name) for name in "abc"]
    seconds = measure_in_turns(actions, repeats=3)
    assert order == [*"abc", *"abc", *"bca", *"cab"]
    assert [len(own) for own in seconds] == [3, 3, 3]


def test_the_slower_action_takes_longer() -> None:
    fast, slow = measure_in_turns([lambda: None, lambda: time.sleep(0.01)], repeats=2)
    assert max(fast) < min(slow)


def test_the_work_of_an_accelerator_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pending = [0.0], [0.0]

    def launch(seconds: float) -> None:
        pending[0] += seconds

    def synchronize(_: torch.device) -> None:
        clock[0], pending[0] = clock[0] + pending[0], 0.0

    device = torch.device("cuda", 0)
    monkeypatch.setattr("dacc.runtime.timing.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: device)
    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    actions = [lambda: launch(3), lambda: launch(1)]
    assert measure_in_turns(actions, repeats=2) == [[3, 3], [1, 1]]
    assert measure_in_turns(actions, repeats=2, device=device) == [[3, 3], [1, 1]]
    assert measure_in_turns(actions, repeats=2, device=torch.device("cpu")) == [[0, 0], [0, 0]]
