"""The stages of the benchmark go on where they stopped; the outliers are where layers read them."""

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from dacc.benchmarks import svdquant_size
from dacc.benchmarks.svdquant_size import STAGES, parse, plant_, read_report, run_stage, unfinished


def test_planted_channels_stick_out_of_what_attention_and_feed_forward_read():
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, sample_size=8, caption_channels=12,
        cross_attention_dim=32, use_additional_conditions=False,
    ).eval()  # fmt: skip
    plant_(model, channels=2, size=30.0)
    seen = {}
    for name in ("transformer_blocks.1.attn1.to_q", "transformer_blocks.0.ff.net.0.proj"):
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0].abs().flatten(0, -2).amax(0)})
        )
    with torch.no_grad():
        model(
            torch.randn(1, 4, 8, 8),
            torch.randn(1, 5, 12),
            torch.tensor([500]),
            {"resolution": None, "aspect_ratio": None},
        )
    assert len(seen) == 2
    for absmax in seen.values():
        assert int((absmax > 8 * absmax.median()).sum()) == 2


def test_finished_stages_are_not_run_again_unless_something_else_is_asked_for(tmp_path, monkeypatch):
    ran = []
    for name in STAGES:
        monkeypatch.setitem(STAGES, name, lambda work, options, name=name: ran.append(name) or {"fact": 1})
    options = parse([f"--work={tmp_path}", "--depth=2"])
    assert unfinished(options) == list(STAGES)
    for name in ("make", "calibrate"):
        run_stage(name, options)
    assert ran == ["make", "calibrate"]
    assert unfinished(options) == ["full", "data-free"]
    assert unfinished(parse([f"--work={tmp_path}", "--depth=3"])) == list(STAGES)
    report = read_report(tmp_path)
    assert report["make"]["fact"] == 1
    assert report["make"]["depth"] == 2
    assert report["calibrate"]["peak_gb"] > 0.01


def test_the_published_depth_is_the_default():
    from dacc.benchmarks.full_size_models import MODELS

    assert parse(["--work=x"]).depth == MODELS[svdquant_size.MODEL].published_depth


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_can_be_named(stage):
    assert parse(["--work=x", f"--stage={stage}"]).stage == stage
