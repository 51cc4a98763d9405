import pytest
import torch

from dacc.runtime import here


@pytest.mark.parametrize(("found", "name"), [(True, "cpu-int8"), (False, "cpu-float")])
def test_a_processor_is_told_by_trying_its_products(monkeypatch, found, name):
    monkeypatch.setattr(here, "has_int8_products", lambda: found)
    assert here.target_here(torch.device("cpu")).name == name


@pytest.mark.parametrize(("capability", "name"), [((9, 0), "hopper"), ((8, 9), "ada"), ((7, 0), None)])
def test_a_gpu_is_told_by_its_capability(monkeypatch, capability, name):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    target = here.target_here(torch.device("cuda"))
    assert (target.name if target else None) == name


def test_other_accelerators_are_not_guessed(monkeypatch):
    assert here.target_here(torch.device("meta")) is None
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert here.target_here(torch.device("cuda")) is None
