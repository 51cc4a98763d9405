"""What a format cannot hold is refused, named, and recorded."""

from __future__ import annotations

import json

import pytest

from dacc.calibrate.api import calibrate_pipeline
from dacc.calibrate.config import CalibrateConfig
from dacc.core.errors import UnsupportedError
from dacc.core.reporter import silent
from dacc.export.api import export_pipeline
from dacc.export.config import ExportConfig


@pytest.mark.parametrize(
    ("options", "lost"),
    [
        ({"act_mode": "static"}, "the activation scales of unet,"),
        ({"act_mode": "per-step"}, "the activation scales of every step of unet"),
        ({"attention_bits": 8}, "the rounding of the products of attention in unet"),
    ],
)
def test_a_loss_needs_lossy(bundle, unet_folder, options, lost):
    calib = {}
    if "act_mode" in options:
        strategy = "every-step" if options["act_mode"] == "per-step" else "uniform"
        config = CalibrateConfig(samples=2, steps=3, strategy=strategy, batch_size=2)
        calib = {"calib": calibrate_pipeline(unet_folder, config, output="set", device="cpu")}
    small = bundle(unet_folder, calib, bits=8, act_bits=8, **options)
    with pytest.raises(UnsupportedError, match=lost) as refusal:
        export_pipeline(small, ExportConfig(format="safetensors-bf16"), output="out")
    assert "--lossy" in refusal.value.mend
    assert refusal.value.exit_code == 7
    reporter = silent()
    folder = export_pipeline(
        small, ExportConfig(format="safetensors-bf16", lossy=True), output="out", reporter=reporter
    )
    (found,) = json.loads((folder / "dacc_export.json").read_text())["lost"]
    assert lost.rstrip(",") in found
    assert f"lost: {found}." in reporter.notices
    assert found in (folder / "README.md").read_text()


def test_scales_that_are_found_at_run_time_are_no_loss(bundle, unet_folder):
    small = bundle(unet_folder, bits=8, act_bits=8)
    folder = export_pipeline(small, ExportConfig(format="safetensors-bf16"), output="out")
    assert json.loads((folder / "dacc_export.json").read_text())["lost"] == []
