"""Quantized pipelines against their own float one, from the same noise, on a trained pipeline and on a tiny one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import dacc
from dacc import CalibrateConfig, QuantizeConfig, calibrate_pipeline, quantize_pipeline
from dacc.core.reporter import silent
from dacc.core.source import resolve_source, zoo_entry_of
from dacc.runtime.compare import compare
from dacc.runtime.request import RunRequest
from dacc.runtime.trajectory import sample

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 inside diffusers
STEPS = 10


@pytest.fixture(scope="module")
def effect_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[float, float]]:
    """Relative L2 and PSNR of a quantized pipeline, 16 images of 10 steps; all methods see one calibration set."""
    root = tmp_path_factory.mktemp("quality")
    sets: dict[str, Path] = {}

    def make(source: str | Path, method: str, bits: int, act_bits: int = 16, **settings: int) -> tuple[float, float]:
        key = str(source)
        if key not in sets:
            recipe = CalibrateConfig(strategy="every-step", samples=16, steps=STEPS, batch_size=8)
            sets[key] = calibrate_pipeline(source, recipe, output=root / f"set-{len(sets)}", device="cpu")
        static = {"act_mode": "static"} if method in ("rtn", "gptq") and act_bits < 16 else {}  # as the others do
        config = QuantizeConfig(
            bits=bits, act_bits=act_bits, method=method, group_size="channel", settings=settings, measure="never",
            **static,
        )  # fmt: skip
        calib = sets[key] if static or method != "rtn" else None
        output = root / f"{len(sets)}-{method}-{bits}-{act_bits}"
        bundle = quantize_pipeline(source, config, calib=calib, output=output, device="cpu")
        entry = zoo_entry_of(resolve_source(key, reporter=silent()))
        request = RunRequest(seeds=tuple(range(100, 116)), num_inference_steps=STEPS).with_zoo_defaults(entry)
        found = [sample(dacc.load(path, device="cpu"), request) for path in (source, bundle)]
        effect = compare(*found, steps=STEPS)
        assert effect.relative_l2 is not None
        assert effect.psnr is not None
        return effect.relative_l2, effect.psnr

    return make


@pytest.mark.slow
def test_on_a_trained_transformer_every_method_is_nearer_than_rounding_to_nearest(effect_of):
    source = "zoo:digits-dit"
    error = {
        "rtn": effect_of(source, "rtn", 4, 8)[0],
        "gptq": effect_of(source, "gptq", 4, 8)[0],
        "qdiffusion": effect_of(source, "qdiffusion", 4, 8, iterations=20)[0],
        "tfmq": effect_of(source, "tfmq", 4, 8, iterations=20)[0],
    }
    assert max(error["gptq"], error["qdiffusion"], error["tfmq"]) < 0.7 * error["rtn"], error
    assert error["tfmq"] < 1.05 * error["qdiffusion"], error
    assert effect_of(source, "rtn", 8)[1] > 45


def test_on_a_tiny_unet_too(effect_of, unet_folder):
    error = {
        "rtn": effect_of(unet_folder, "rtn", 4, 8)[0],
        "gptq": effect_of(unet_folder, "gptq", 4, 8)[0],
        "qdiffusion": effect_of(unet_folder, "qdiffusion", 4, 8, iterations=20)[0],
        "tfmq": effect_of(unet_folder, "tfmq", 4, 8, iterations=20)[0],
    }
    assert max(error["gptq"], error["qdiffusion"], error["tfmq"]) < error["rtn"], error
    assert error["tfmq"] <= error["qdiffusion"], error
    assert effect_of(unet_folder, "rtn", 8)[1] > 40
