"""Argument trees come back exactly as they were, or are refused by name."""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any

import pytest
import torch

from dacc.calibrate.arguments import Packer, unpack
from dacc.core.errors import BundleError, CalibrationError, UnsupportedError


def loading(packer: Packer) -> Any:
    """What gives a stored tensor in the type that it had."""
    return lambda name, dtype: packer.tensors[name].to(dtype or packer.tensors[name].dtype)


def through_json(value: Any, store_dtype: str = "as-is") -> Any:
    packer = Packer(store_dtype)
    packed = json.loads(json.dumps(packer.pack(value, "it"), sort_keys=True))
    return unpack(packed, loading(packer))


def same(one: Any, other: Any) -> bool:
    if torch.is_tensor(one):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_nested_values_come_back_with_their_types_and_order() -> None:
    value = {
        "z": (1, 2.5, True, None, "text", [], ()),
        "a": [{"b": torch.arange(3), "tensor": "a word"}, (torch.tensor(7.5),)],
        "types": [torch.ones(2, 2).to(dtype) for dtype in (torch.bfloat16, torch.bool, torch.int64, torch.complex64)],
        "empty": torch.empty(0, 4),
        "strided": torch.arange(6.0).reshape(2, 3).t().expand(2, 3, 2),
    }
    assert same(through_json(value), value)


def test_equal_tensors_are_kept_once_and_later_changes_do_not_reach_them() -> None:
    packer, tensor = Packer(), torch.ones(3)
    packed = [packer.pack(tensor, "one"), packer.pack(tensor.clone(), "other"), packer.pack(torch.ones(1, 3), "third")]
    tensor.zero_()
    assert packed[0] == packed[1] != packed[2]
    assert len(packer.tensors) == 2
    assert torch.equal(unpack(packed[0], loading(packer)), torch.ones(3))


def test_a_cast_is_for_large_float_tensors_alone() -> None:
    large, whole, vector = torch.rand(2, 3, 4), torch.arange(24).reshape(2, 3, 4), torch.tensor([999.0])
    assert torch.equal(through_json(large, "float16"), large.half().float())
    assert torch.equal(through_json(whole, "float16"), whole)
    assert torch.equal(through_json(vector, "bfloat16"), vector)
    with pytest.raises(CalibrationError, match="--store-dtype bfloat16"):
        through_json(large * 1e6, "float16")


@pytest.mark.parametrize("value", [torch.tensor([1.0, float("nan")]), torch.tensor(float("inf")), float("nan")])
def test_values_that_are_not_finite_are_refused(value: Any) -> None:
    with pytest.raises(CalibrationError, match=r"argument 'x'\[0\] holds NaN or infinity"):
        Packer().pack([value], "argument 'x'")


@pytest.mark.parametrize(
    "value", [object(), {1: 2}, OrderedDict(a=1), torch.Size([1]), torch.eye(2).to_sparse(), torch.float32, b"bytes"]
)
def test_other_kinds_are_refused_by_name(value: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"argument 'x'\['deep'\] is a"):
        Packer().pack({"deep": value}, "argument 'x'")


@pytest.mark.parametrize("packed", [{"pickle": "x"}, {}, {"list": [], "tuple": []}, [1], {"tensor": 3}])
def test_what_we_never_write_is_not_read(packed: Any) -> None:
    with pytest.raises(BundleError, match="a stored argument is written as"):
        unpack(packed, lambda name, dtype: torch.zeros(1))
