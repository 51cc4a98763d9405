"""On a trained pipeline: what the searches are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dacc
from dacc import SearchCacheConfig, search_cache
from dacc.core.manifest import read_manifest
from dacc.core.seeds import seed_stream
from dacc.runtime.compare import relative_l2
from dacc.runtime.request import RunRequest
from dacc.runtime.trajectory import sample

REQUEST = RunRequest(seeds=seed_stream("effect", 0, 4), num_inference_steps=20, batch_size=4)
JOINT = {"cost": "feature"}
UNCORRECTED, NAIVE = {**JOINT, "correct": False}, {**JOINT, "joint": False, "correct": False}


PIPELINES = pytest.mark.parametrize("name", ["zoo:digits-unet", "zoo:digits-dit"])


def latents(source: str | Path, request: RunRequest = REQUEST) -> torch.Tensor:
    return sample(dacc.load(source, device="cpu"), request).latents


@pytest.mark.slow
@PIPELINES
def test_a_searched_plan_is_nearer_than_uniform_ones_and_than_fewer_steps(tmp_path: Path, name: str) -> None:
    wanted = latents(name)

    def error(place: str, **fields: Any) -> float:
        request = SearchCacheConfig(macs_ratio=0.4, steps=20, samples=4, measure="never", **fields)
        bundle = search_cache(name, request, output=tmp_path / place, device="cpu")
        (record,) = read_manifest(bundle).components.values()
        assert record.cache.macs_ratio <= 0.4
        return float(relative_l2(wanted, latents(bundle)).mean())

    rules = [error(form, method="deepcache", settings={"form": form}) for form in ("even", "code")]
    fewer = latents(name, REQUEST.model_copy(update={"num_inference_steps": 8}))
    assert error("forecast", method="taylor") < 0.9 * min(*rules, float(relative_l2(wanted, fewer).mean()))
    assert error("reused", method="dp") < 0.9 * min(rules)


@pytest.mark.slow
@PIPELINES
def test_joint_search_and_correction_bring_a_quantized_pipeline_nearer_to_the_float_one(
    tmp_path: Path, name: str
) -> None:
    config = dacc.QuantizeConfig(bits=4, act_bits=8, measure="never")
    quantized = dacc.quantize_pipeline(name, config, output=tmp_path / "q", device="cpu")
    wanted = latents(name)

    def error(place: str, **fields: Any) -> float:
        request = SearchCacheConfig(macs_ratio=0.4, steps=20, samples=4, measure="never", **fields)
        bundle = search_cache(quantized, request, output=tmp_path / place, device="cpu")
        return float(relative_l2(wanted, latents(bundle)).mean())

    even = error("even", method="deepcache")
    naive = error("naive", method="dp", settings=NAIVE)
    uncorrected = error("uncorrected", method="dp", settings=UNCORRECTED)
    joint = error("joint", method="dp", settings=JOINT)
    assert joint < 0.95 * min(even, naive)
    assert joint < uncorrected < 1.05 * naive
