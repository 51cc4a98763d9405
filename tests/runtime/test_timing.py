import time

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


def test_what_an_accelerator_still_does_is_waited_for_before_each_start_and_stop(monkeypatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: order.append("wait"))
    monkeypatch.setattr(time, "perf_counter", lambda: float(order.append("clock") or 0))
    measure_in_turns([lambda: order.append("action")], repeats=2)
    turn = ["wait", "clock", "action", "wait", "clock"]
    assert order == ["action", *turn, *turn]
