"""Outputs are judged as the pipeline combines them, also where nobody asked for a scale."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dacc import PruneConfig
from dacc.core.reporter import silent
from dacc.prune import guidance
from dacc.prune.guidance import guidance_of
from dacc.prune.preview import preview_pruning


def scale_of(pipeline: str, asked: float | None = None, *, distilled: bool = False) -> float | None:
    record: Any = SimpleNamespace(pipeline=pipeline, recipe={"guidance_scale": asked})
    return guidance_of(record, distilled=distilled)


@pytest.mark.parametrize(
    ("pipeline", "scale"),
    [
        ("StableDiffusionPipeline", 7.5),
        ("WanPipeline", 5.0),
        ("QwenImagePipeline", 4.0),  # true_cfg_scale
        ("FluxPipeline", 1.0),  # true_cfg_scale; its guidance_scale of 3.5 combines nothing
        ("DDPMPipeline", None),
        ("SomebodysOwnPipeline", None),
    ],
)
def test_without_a_scale_it_is_the_default_of_the_pipelines_call(pipeline, scale):
    assert scale_of(pipeline) == scale


def test_a_scale_that_was_asked_for_counts_unless_it_enters_the_denoiser():
    assert scale_of("StableDiffusionPipeline", 3.0) == 3.0
    assert scale_of("FluxPipeline", 3.0) == 3.0
    assert scale_of("FluxPipeline", 3.0, distilled=True) == 1.0
    assert scale_of("SomebodysOwnPipeline", 3.0) == 3.0


def errors_of(source, calib, reporter=None):
    preview = preview_pruning(source, PruneConfig(ratio=0.2), calib=calib, device="cpu", reporter=reporter or silent())
    return {name: unit.score for name, unit in preview.components["transformer"].units.items()}


def test_a_set_made_with_the_default_scale_is_judged_by_it(deep_dit, inputs_of, monkeypatch):
    calib, reporter = inputs_of(deep_dit), silent()
    found = errors_of(deep_dit, calib, reporter)
    assert not any("guidance" in text for text in reporter.notices)
    monkeypatch.setattr("dacc.prune.run.guidance_of", lambda *_, **__: 4.0)
    assert errors_of(deep_dit, calib) == found


def test_branches_of_an_unknown_scale_are_told(deep_dit, inputs_of, monkeypatch):
    monkeypatch.setattr(guidance, "diffusers", SimpleNamespace())
    reporter = silent()
    errors_of(deep_dit, inputs_of(deep_dit), reporter)
    assert any("--guidance-scale" in text for text in reporter.notices)
