from __future__ import annotations

import json
from pathlib import Path

import pytest

from dacc.evaluate.inspection import inspect_pipeline
from dacc.evaluate.report import print_inspection


@pytest.mark.parametrize(("name", "denoiser"), [("tiny-unet", "unet"), ("tiny-dit", "transformer")])
def test_a_pipeline_is_taken_apart(
    tiny_zoo: Path, name: str, denoiser: str, capsys: pytest.CaptureFixture[str]
) -> None:
    inspection = inspect_pipeline(f"zoo:{name}")
    part = inspection.components[denoiser]
    assert part.is_denoiser
    assert part.macs_per_call > 0
    assert sum(block.parameter_share for block in part.blocks) <= 1
    assert 0 < sum(block.time_share for block in part.blocks) <= 1
    for row in part.quantizable.values():
        assert row.bytes_at_4_bits <= row.bytes_at_8_bits < row.bytes_now == 4 * row.parameters
    assert inspection.components["scheduler"].parameters == 0
    assert next(iter(json.loads(inspection.model_dump_json()))) == "schema"
    print_inspection(inspection)
    assert set(inspection.products) == {"--bits 4", "--bits 8 --act-bits 8", "--bits 4 --act-bits 4"}
    printed = capsys.readouterr().out
    assert "what quantize could do" in printed
    assert "4-bit values in" in printed


@pytest.mark.filterwarnings("ignore::FutureWarning")  # inside diffusers
@pytest.mark.parametrize(("name", "denoiser"), [("tiny-sd", "unet"), ("tiny-flux", "transformer")])
def test_a_text_pipeline_is_taken_apart(text_zoo: Path, name: str, denoiser: str) -> None:
    components = inspect_pipeline(f"zoo:{name}").components
    assert {part for part, facts in components.items() if facts.is_denoiser} == {denoiser}
    assert components[denoiser].macs_per_call > 0
    assert components["text_encoder"].parameters > 0
