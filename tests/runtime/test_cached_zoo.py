"""On the trained pipelines: nothing changes where everything is computed, quantized layers run under a plan as ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dacc
from dacc.core.reporter import silent
from dacc.core.source import resolve_source, zoo_entry_of
from dacc.runtime.cached import CachedUnits
from dacc.runtime.installed import install_plan_, no_cache, remove_plans_
from dacc.runtime.request import RunRequest
from dacc.runtime.trajectory import capture_calls, sample

from .cache_plans import BODY, CUT, blocks, denoiser_of, plan_for
from .test_cached import installed, run_grid

MMDIT = ("transformer_blocks", "single_transformer_blocks")
BODIES = {  # the units that searches take by default, of reuse and of forecasts
    "digits-unet": (CUT, BODY),
    "digits-dit": (blocks(1, 7), blocks(0, 8)),
    "shapes-sd": (CUT, BODY),
    "shapes-mmdit": (blocks(1, 11, *MMDIT), blocks(0, 12, *MMDIT)),
    "digits-video": (CUT, BODY),
}


def request_of(name: str) -> RunRequest:
    source = resolve_source(f"zoo:{name}", reporter=silent())
    return RunRequest(seeds=(5,), num_inference_steps=4).with_zoo_defaults(zoo_entry_of(source))


@pytest.mark.parametrize("name", BODIES)
def test_a_plan_that_computes_everything_changes_no_bit_of_a_zoo_pipeline(name):
    if name not in ("digits-unet", "digits-dit") and not (Path(dacc.__file__).parent / "zoo" / name).is_dir():
        pytest.skip("it is in checkouts only")
    pipe: Any = dacc.load(f"zoo:{name}", device="cpu")
    before = sample(pipe, request_of(name))
    for unit in BODIES[name]:
        install_plan_(pipe, denoiser_of(pipe)[0], _plan(pipe, name, "CCCC", unit))
        after = sample(pipe, request_of(name))
        assert torch.equal(before.latents, after.latents)
        assert torch.equal(before.images, after.images)


def _plan(pipe: Any, name: str, codes: str, unit: Any = CUT) -> Any:
    return plan_for(pipe, {unit: codes}, rule="exact", grid=run_grid(pipe, request_of(name)))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """digits-unet with 8-bit weights and float activations."""
    folder = tmp_path_factory.mktemp("quantized") / "w8"
    config = dacc.QuantizeConfig(bits=8, measure="never")
    return Path(dacc.quantize_pipeline("zoo:digits-unet", config, output=folder, device="cpu"))


def test_a_quantized_pipeline_runs_with_a_plan(quantized):
    pipe: Any = dacc.load(quantized, device="cpu")
    request = request_of("digits-unet")
    before = sample(pipe, request).latents
    install_plan_(pipe, "unet", _plan(pipe, "digits-unet", "CCCC"))
    assert torch.equal(sample(pipe, request).latents, before)
    installed(pipe, {CUT: "CRCR"})
    cached = sample(pipe, request).latents
    assert not torch.equal(cached, before)
    assert (cached - before).norm() / before.norm() < 0.5
    with no_cache(pipe):
        assert torch.equal(sample(pipe, request).latents, before)


def test_layers_that_run_see_the_call_of_the_clock_and_reuse_is_exact(quantized):
    """The hooks neither move the clock nor hide it from the quantized layers behind them."""
    pipe: Any = dacc.load(quantized, device="cpu")
    seen: list[int] = []
    request = request_of("digits-unet")
    pipe.unet.up_blocks[-1].resnets[-1].conv1.register_forward_hook(lambda *_: seen.append(dacc.current_run().call))
    installed(pipe, {CUT: "CRCR"})
    sample(pipe, request)
    assert seen == [0, 1, 2, 3]
    remove_plans_(pipe)
    call = capture_calls(pipe, request)[1]
    units, values = CachedUnits(pipe.unet, [CUT]), {}
    with units.recording(values):
        full = call.replay(pipe.unet)[0]
    with units.reusing(values, ["deep"]):
        assert torch.equal(call.replay(pipe.unet)[0], full)
