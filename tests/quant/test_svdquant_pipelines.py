"""svdquant on whole pipelines: what is treated together, what stays as it was, what a killed run leaves, memory, and
images."""

import os
import signal
import subprocess
import sys

import pytest
import torch

import dacc
from dacc import CalibrateConfig, QuantizeConfig, calibrate_pipeline, quantize_pipeline
from dacc.core.manifest import read_manifest
from dacc.core.tensor_file import stored_tensors
from dacc.quant.methods import svdquant
from dacc.runtime.request import RunRequest
from dacc.runtime.trajectory import sample

W4A4 = {"bits": 4, "act_bits": 4, "measure": "never"}
JOINT = {"attn.to_q attn.to_k attn.to_v", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"}
GROUPS = {  # layers of the first block of each kind that read one tensor; all others are alone
    ("dit_folder", "transformer_blocks.0"): {"attn1.to_q attn1.to_k attn1.to_v"},
    ("flux_folder", "transformer_blocks.0"): JOINT,
    ("flux_folder", "single_transformer_blocks.0"): {"proj_mlp attn.to_q attn.to_k attn.to_v"},
    ("sd_folder", "down_blocks.1.attentions.0"): {
        "transformer_blocks.0.attn1.to_q transformer_blocks.0.attn1.to_k transformer_blocks.0.attn1.to_v",
        "transformer_blocks.0.attn2.to_k transformer_blocks.0.attn2.to_v",
    },
}


@pytest.fixture
def treated_together(monkeypatch):
    """The groups of layers that were treated so far, by their names in their block."""
    found, quantize_group = [], svdquant.quantize_group

    def watched(weights, *arguments):
        found.append(frozenset(weights))
        return quantize_group(weights, *arguments)

    monkeypatch.setattr(svdquant, "quantize_group", watched)
    return found


@pytest.mark.parametrize("kind", ["dit_folder", "flux_folder", "sd_folder"])
def test_layers_that_read_one_tensor_are_found_and_what_is_kept_is_bit_for_bit(
    kind, request, calibration_of, treated_together, tmp_path
):
    source = request.getfixturevalue(kind)
    config = QuantizeConfig(method="svdquant", settings={"rank": 2}, **W4A4)
    bundle = quantize_pipeline(source, config, calib=calibration_of(source), output=tmp_path / "out", device="cpu")
    shared = {group for group in treated_together if len(group) > 1}
    for (pipeline, block), groups in GROUPS.items():
        if pipeline == kind:
            wanted = {frozenset(f"{block}.{name}" for name in names.split()) for names in groups}
            assert {group for group in shared if any(name.startswith(f"{block}.") for name in group)} == wanted
    for name, record in read_manifest(bundle).components.items():
        before, after = stored_tensors(source / name), stored_tensors(bundle / name)
        kept = [key for key in before if key in after]
        assert not {key.rpartition(".")[0] for key in kept if key.endswith("weight")} & {
            layer for layer, one in record.quantization.modules.items() if one.scheme
        }
        assert len(kept) > 10
        for key in kept:
            value = after[key].load()
            assert torch.equal(value, before[key].load().to(value.dtype)), key


KILLED = """
import os, signal, sys
from dacc import QuantizeConfig, quantize_pipeline
from dacc.quant.methods import svdquant

source, calib, output, config = sys.argv[1:]
done, quantize_group = [], svdquant.quantize_group

def dying(*arguments):
    done.append(None)
    if len(done) > 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return quantize_group(*arguments)

svdquant.quantize_group = dying
config = QuantizeConfig.model_validate_json(config)
quantize_pipeline(source, config, calib=calib, output=output, device="cpu")
"""


def child(code: str, *words: object) -> "subprocess.CompletedProcess[str]":
    """Another process with as many threads as this one."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, env=os.environ | threads, capture_output=True, text=True, check=False)


def test_a_killed_run_goes_on_to_the_same_bytes(dit_folder, calibration_of, files_of, treated_together, tmp_path):
    config, calib = QuantizeConfig(method="svdquant", settings={"rank": 2}, **W4A4), calibration_of(dit_folder)
    whole = quantize_pipeline(dit_folder, config, calib=calib, output=tmp_path / "whole", device="cpu")
    groups = len(treated_together)
    ended = child(KILLED, dit_folder, calib, tmp_path / "again", config.model_dump_json())
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (tmp_path / "again").exists()
    treated_together.clear()
    again = quantize_pipeline(dit_folder, config, calib=calib, output=tmp_path / "again", device="cpu")
    assert 0 < len(treated_together) < groups
    assert files_of(again) == files_of(whole)


PEAK = """
import sys
from dacc import QuantizeConfig, quantize_pipeline
from dacc.evaluate.memory import peak_resident_bytes

source, calib, output, config = sys.argv[1:]
config = QuantizeConfig.model_validate_json(config)
quantize_pipeline(source, config, calib=calib, output=output, device="cpu")
print(peak_resident_bytes())
"""


@pytest.mark.slow
def test_memory_grows_with_depth_by_the_network_alone(dit_pipeline, calibration_of, tmp_path):
    """What a block needs while it is treated is there for the next one."""
    quick = QuantizeConfig(method="svdquant", settings={"rank": 4, "steps": 2, "refinements": 0}, **W4A4)
    peaks, sizes = [], []
    for depth in (1, 10):  # far apart: what a process holds besides varies by some 30 MB
        pipe, folder = dit_pipeline(), tmp_path / f"deep-{depth}"
        config = pipe.transformer.config | {"num_attention_heads": 16, "num_layers": depth}
        pipe.transformer = type(pipe.transformer).from_config(config)
        pipe.save_pretrained(folder)
        sizes.append(4 * sum(parameter.numel() for parameter in pipe.transformer.parameters()))
        ended = child(PEAK, folder, calibration_of(folder), tmp_path / f"out-{depth}", quick.model_dump_json())
        assert ended.returncode == 0, ended.stderr
        peaks.append(int(ended.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 2 * (sizes[1] - sizes[0])


@pytest.mark.slow
def test_rank_of_images_is_above_factors_alone_and_round_to_nearest(tmp_path):
    """PSNR of a trained pipeline, half of whose blocks are quantized, at the same activation scales."""
    source, request = "zoo:digits-dit", RunRequest(seeds=tuple(range(8)), num_inference_steps=10, guidance_scale=1.5)
    calib = calibrate_pipeline(source, CalibrateConfig(samples=8, steps=10, timesteps=5), output=tmp_path / "set")
    wanted = sample(dacc.load(source), request).images
    rows = {"rtn": ("rtn", {}), "factors": ("svdquant", {"rank": 0}), "rank 8": ("svdquant", {"rank": 8})}
    psnr = {}
    for row, (method, settings) in rows.items():
        config = QuantizeConfig(
            method=method, settings=settings, act_mode="per-group", include=("transformer_blocks.[0-3].*",), **W4A4
        )
        bundle = quantize_pipeline(source, config, calib=calib, output=tmp_path / row.replace(" ", "-"), device="cpu")
        error = (sample(dacc.load(bundle), request).images - wanted).square().mean((1, 2, 3))
        psnr[row] = float((-10 * error.log10()).mean())
    assert psnr["rank 8"] > psnr["factors"] > psnr["rtn"]
    assert psnr["rank 8"] > psnr["rtn"] + 3
