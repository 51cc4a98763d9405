"""On a trained pipeline: what the searches are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dacc
from dacc import SearchCacheConfig, search_cache
from dacc.core.seeds import seed_stream
from dacc.runtime.compare import relative_l2
from dacc.runtime.request import RunRequest
from dacc.runtime.trajectory import sample

REQUEST = RunRequest(seeds=seed_stream("effect", 0, 4), num_inference_steps=20, batch_size=4)
JOINT, NAIVE = {"cost": "feature"}, {"cost": "feature", "joint": False, "correct": False}


@pytest.mark.slow
def test_joint_search_and_correction_bring_a_quantized_pipeline_nearer_to_the_float_one(tmp_path: Path) -> None:
    config = dacc.QuantizeConfig(bits=4, act_bits=8, measure="never")
    quantized = dacc.quantize_pipeline("zoo:digits-unet", config, output=tmp_path / "q", device="cpu")
    wanted = sample(dacc.load("zoo:digits-unet", device="cpu"), REQUEST).latents

    def error(name: str, **fields: Any) -> float:
        request = SearchCacheConfig(macs_ratio=0.4, steps=20, samples=4, measure="never", **fields)
        bundle = search_cache(quantized, request, output=tmp_path / name, device="cpu")
        return float(relative_l2(wanted, sample(dacc.load(bundle, device="cpu"), REQUEST).latents).mean())

    even = error("even", method="deepcache")
    naive = error("naive", method="dp", settings=NAIVE)
    joint = error("joint", method="dp", settings=JOINT)
    assert joint < 0.95 * min(even, naive)
