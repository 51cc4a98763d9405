"""Calibrated methods on an accelerator: nothing stays behind on the CPU, and results are those of the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from dacc.calibrate.api import calibrate_pipeline
from dacc.calibrate.config import CalibrateConfig
from dacc.core.reporter import silent
from dacc.quant.api import quantize_pipeline
from dacc.quant.config import QuantizeConfig

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 inside diffusers

SCRIPT = Path(__file__).with_name("second_device.py")
FEW = ("mid_block.resnets.0*", "mid_block.attentions*", "time_embedding*")
W4A8 = {"bits": 4, "act_bits": 8, "include": FEW}
CASES = {
    "gptq": W4A8 | {"method": "gptq"},
    "svdquant": W4A8 | {"method": "svdquant", "act_bits": 4, "settings": {"rank": 4, "steps": 2}},
    "ptq4dm": W4A8 | {"method": "ptq4dm"},
    "qdiffusion": W4A8 | {"method": "qdiffusion", "settings": {"iterations": 8}},
    "tfmq": W4A8 | {"method": "tfmq", "settings": {"iterations": 8}},
    "efficientdm": W4A8 | {"method": "efficientdm", "settings": {"updates": 4, "weigh": "sensitivity"}},
}


@pytest.fixture(scope="module")
def calibration(unet_folder, tmp_path_factory):
    config = CalibrateConfig(strategy="every-step", samples=4, steps=3)
    folder = tmp_path_factory.mktemp("sets") / "set"
    return calibrate_pipeline(unet_folder, config, output=folder, device="cpu", reporter=silent())


@pytest.fixture(scope="module")
def away(unet_folder, calibration, tmp_path_factory):
    """Folder of the bundles that the second device made."""
    folder = tmp_path_factory.mktemp("away")
    cases = json.dumps({name: [str(calibration), fields] for name, fields in CASES.items()})
    subprocess.run(
        [sys.executable, SCRIPT, unet_folder, folder, cases], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    return folder


@pytest.mark.parametrize("name", list(CASES))
def test_a_second_device_gives_what_the_cpu_gives(name, unet_folder, calibration, away, tmp_path):
    config = QuantizeConfig(measure="never", **CASES[name])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with sdpa_kernel(SDPBackend.MATH):  # what devices without an attention of their own have
            here = quantize_pipeline(
                unet_folder, config, calib=calibration, output=tmp_path / name, device="cpu", reporter=silent()
            )
    finally:
        torch.set_num_threads(threads)
    ours, others = (load_file(next((folder / "unet").glob("*.safetensors"))) for folder in (here, away / name))
    assert ours.keys() == others.keys()
    apart = sum(int((~ours[key].isclose(others[key], rtol=1e-3)).sum()) for key in ours)
    assert apart <= sum(values.numel() for values in ours.values()) / 1000  # gradients are summed in another order
