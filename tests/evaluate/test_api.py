from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from dacc import QuantizeConfig, quantize_pipeline
from dacc.core.errors import ConfigError, ModelError
from dacc.core.seeds import seed_stream
from dacc.evaluate.api import evaluate_pipelines
from dacc.evaluate.config import EvaluateConfig
from dacc.evaluate.report import evaluation_rows, remarks
from dacc.evaluate.result import Evaluation

QUICK = EvaluateConfig(num=4, speed=False, memory=False)


def test_an_unconditional_pipeline_is_compared_and_judged(tiny_zoo: Path) -> None:
    result = evaluate_pipelines([tiny_zoo / "tiny-unet-other"], reference="zoo:tiny-unet", config=QUICK)
    reference, other = result.sources
    assert (reference.identity, reference.is_reference) == ("zoo:tiny-unet", True)
    assert set(reference.metrics) == {"fid"}
    assert set(other.metrics) == {"relative_l2", "psnr", "ssim", "fid", "class_agreement"}
    error = other.metrics["relative_l2"]
    assert 0 < error.low <= error.value <= error.high <= error.worst
    assert error.worst_seed in seed_stream("evaluation", 0, 4)
    assert other.metrics["psnr"].worst <= other.metrics["psnr"].value
    assert "biased" in other.metrics["fid"].note
    assert other.components["unet"].bytes_on_disk > 0
    assert result.settings.steps == 2
    assert result.judge_fid_between_halves == 1.5
    assert any("speed" in reason for reason in result.absent)


@pytest.mark.parametrize("form", [str, Path])
def test_a_lone_source_needs_no_list(tiny_zoo: Path, form: type) -> None:
    result = evaluate_pipelines(form(tiny_zoo / "tiny-unet-other"), reference="zoo:tiny-unet", config=QUICK)
    assert [source.name for source in result.sources] == ["tiny-unet", "tiny-unet-other"]


def test_a_class_conditional_pipeline_is_asked_for_the_zoos_classes(tiny_zoo: Path) -> None:
    result = evaluate_pipelines([tiny_zoo / "tiny-dit-other"], reference="zoo:tiny-dit", config=QUICK)
    assert result.settings.labels == (0, 1, 2)
    assert result.settings.guidance_scale == 2.0
    assert all("class_accuracy" in report.metrics for report in result.sources)
    assert all("class_agreement" not in report.metrics for report in result.sources)


def test_equal_pipelines_have_no_error(tiny_zoo: Path) -> None:
    result = evaluate_pipelines([tiny_zoo / "zoo" / "tiny-unet"], reference=tiny_zoo / "tiny-unet-other", config=QUICK)
    same = evaluate_pipelines(["zoo:tiny-unet"], config=QUICK)
    assert result.sources[1].metrics["relative_l2"].value > 0
    assert len(same.sources) == 1


def test_without_a_judge_the_report_says_what_is_absent(tiny_zoo: Path) -> None:
    result = evaluate_pipelines([tiny_zoo / "tiny-unet-other"], config=QUICK)
    assert result.judge is None
    assert "frechet, judged_caption, judged_class" in result.absent[0]
    assert result.settings.steps == 20


def test_what_was_asked_for_and_says_nothing_is_absent_with_its_reason(tiny_zoo: Path) -> None:
    asked = ("judged_caption", "judged_clip", "judged_class", "latent_error", "frechet")
    result = evaluate_pipelines(["zoo:tiny-unet"], config=QUICK.model_copy(update={"metrics": asked}))
    assert set(result.sources[0].metrics) == {"fid"}
    absent = {reason.partition(":")[0]: reason for reason in result.absent}
    assert "have no prompts" in absent["judged_caption"]
    assert "have no prompts" in absent["judged_clip"]
    assert "no class was asked for" in absent["judged_class"]
    assert "no other source" in absent["latent_error"]
    assert "frechet" not in absent


def test_metrics_that_were_not_asked_for_come_where_they_apply_and_are_not_missed(tiny_zoo: Path) -> None:
    result = evaluate_pipelines(["zoo:tiny-unet"], config=QUICK)
    assert result.absent == ("speed: switched off.", "peak memory: switched off.")


def test_one_image_has_no_frechet_distance_and_no_line_about_it(tiny_zoo: Path) -> None:
    result = evaluate_pipelines(["zoo:tiny-dit"], config=QUICK.model_copy(update={"num": 1}))
    assert "class_accuracy" in result.sources[0].metrics
    assert any(reason.startswith("frechet: ") and "at least 2" in reason for reason in result.absent)
    assert not any(line.startswith("FID") for line in remarks(result))
    two = evaluate_pipelines(["zoo:tiny-dit"], config=QUICK.model_copy(update={"num": 2}))
    assert not any(reason.startswith("frechet") for reason in two.absent)
    assert any(line.startswith("FID uses judge") for line in remarks(two))


def test_components_that_were_treated_are_sized_in_every_source(tiny_zoo: Path) -> None:
    config = QuantizeConfig(bits=8, component=("vae",), measure="never")
    small = quantize_pipeline("zoo:tiny-dit", config, output=tiny_zoo / "small", device="cpu")
    reference, other = evaluate_pipelines([small], config=QUICK.model_copy(update={"num": 1})).sources
    assert set(reference.components) == set(other.components) == {"transformer", "vae"}
    assert other.components["vae"].bytes_on_disk < reference.components["vae"].bytes_on_disk
    assert other.components["vae"].parameters == reference.components["vae"].parameters
    assert other.components["transformer"] == reference.components["transformer"]


def test_speed_is_measured_in_turns_and_the_report_survives_json(tiny_zoo: Path) -> None:
    config = QUICK.model_copy(update={"speed": True, "speed_repeats": 2, "metrics": ("psnr_ssim",)})
    result = evaluate_pipelines([tiny_zoo / "tiny-unet-other"], reference="zoo:tiny-unet", config=config)
    reference, other = (report.speed for report in result.sources)
    assert reference.speedup is None
    assert other.speedup_low <= other.speedup <= other.speedup_high
    assert other.seconds_low <= other.seconds_per_image <= other.seconds_high
    assert set(result.sources[1].metrics) == {"psnr", "ssim"}
    text = result.model_dump_json()
    assert next(iter(json.loads(text))) == "schema"
    assert Evaluation.model_validate_json(text) == result


def test_the_output_folder_gets_numbers_and_a_picture(tiny_zoo: Path) -> None:
    config = QUICK.model_copy(update={"output": tiny_zoo / "out", "grid_images": 3})
    result = evaluate_pipelines([tiny_zoo / "tiny-unet-other"], reference="zoo:tiny-unet", config=config)
    assert json.loads((tiny_zoo / "out" / "evaluation.json").read_text()) == json.loads(result.model_dump_json())
    with Image.open(tiny_zoo / "out" / "samples.png") as picture:
        assert picture.width > 3 * 96
        assert picture.height > 2 * 96


def test_the_table_names_reference_and_gains(tiny_zoo: Path) -> None:
    result = evaluate_pipelines([tiny_zoo / "tiny-unet-other"], reference="zoo:tiny-unet", config=QUICK)
    rows = {row[0]: row[1:] for row in evaluation_rows(result)}
    assert rows["PSNR, dB"][0] == "-"
    assert "x less" in rows["unet on disk"][1]
    assert any("biased" in line for line in remarks(result))


def test_mistakes_are_refused_with_advice(tiny_zoo: Path) -> None:
    with pytest.raises(ConfigError, match="psnr_ssim"):
        evaluate_pipelines(["zoo:tiny-unet"], config=QUICK.model_copy(update={"metrics": ("psnr_sim",)}))
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        evaluate_pipelines([], config=QUICK)
    _bigger(tiny_zoo / "tiny-unet-other", tiny_zoo / "big")
    with pytest.raises(ModelError, match="Evaluate pipelines of one family"):
        evaluate_pipelines([tiny_zoo / "big"], reference="zoo:tiny-unet", config=QUICK)


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own(tiny_zoo: Path) -> None:
    config = QUICK.model_copy(update={"memory": True, "metrics": ("latent_error",)})
    memory = evaluate_pipelines(["zoo:tiny-unet"], config=config).sources[0].memory
    assert memory is not None
    assert memory.peak_bytes > memory.baseline_bytes > 50_000_000


def _bigger(source: Path, target: Path) -> None:
    """The same pipeline for images of 24 x 24."""
    shutil.copytree(source, target)
    file = target / "unet" / "config.json"
    file.write_text(file.read_text().replace('"sample_size": 16', '"sample_size": 24'))
