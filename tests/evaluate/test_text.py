"""Text-to-image pipelines from the zoo through quantize, generate and evaluate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from dacc import quantize_pipeline
from dacc.core.errors import ModelError
from dacc.core.zoo import zoo_entry
from dacc.evaluate.api import evaluate_pipelines
from dacc.evaluate.config import EvaluateConfig
from dacc.evaluate.generate import GenerateConfig, generate_images
from dacc.evaluate.judge import load_judge
from dacc.evaluate.report import evaluation_rows, remarks
from dacc.quant.config import QuantizeConfig

from .conftest import EVALUATION

QUICK = EvaluateConfig(num=4, speed=False, memory=False)
CHECKED = {"caption_accuracy", "relation_accuracy", "shape_accuracy", "colour_accuracy", "size_accuracy"}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inside diffusers


@pytest.mark.slow
@pytest.mark.parametrize(("name", "denoiser"), [("tiny-sd", "unet"), ("tiny-flux", "transformer")])
def test_a_text_pipeline_goes_all_the_way(text_zoo: Path, tmp_path: Path, name: str, denoiser: str) -> None:
    bundle = quantize_pipeline(f"zoo:{name}", QuantizeConfig(bits=8), output=tmp_path / "small", device="cpu")
    pictures = generate_images(bundle, GenerateConfig(num=2), output=tmp_path / "pictures", device="cpu")
    with Image.open(pictures / "0001.png") as picture:
        assert (picture.size, picture.mode) == ((32, 32), "RGB")
    config = QUICK.model_copy(update={"output": tmp_path / "report", "device": "cpu"})
    result = evaluate_pipelines([bundle], config=config)
    reference, small = result.sources
    assert reference.identity == f"zoo:{name}"
    assert set(reference.metrics) == {"fid", *CHECKED}
    assert set(small.metrics) == {"relative_l2", "psnr", "ssim", "fid", *CHECKED}
    assert small.metrics["psnr"].value > 20
    assert small.components[denoiser].bytes_on_disk < reference.components[denoiser].bytes_on_disk
    assert result.settings.prompts == tuple(EVALUATION)
    assert result.settings.guidance_scale == zoo_entry(name).guidance_scale
    assert "whole caption right" in {row[0] for row in evaluation_rows(result)}
    assert (tmp_path / "report" / "samples.png").is_file()


def test_other_prompts_are_sampled_but_not_checked(text_zoo: Path) -> None:
    config = QUICK.model_copy(update={"prompts": ("a small red circle above a large blue square", "a dog", "a cat")})
    result = evaluate_pipelines(["zoo:tiny-sd"], config=config)
    assert result.sources[0].metrics["caption_accuracy"].count == 2
    assert any("2 of 4 images left out" in line for line in remarks(result))
    strange = config.model_copy(update={"prompts": ("a dog",), "metrics": ("judged_caption",)})
    nothing = evaluate_pipelines(["zoo:tiny-sd"], config=strange)
    assert nothing.sources[0].metrics == {}
    assert "judged_caption: the judge cannot read any of the prompts." in nothing.absent


def test_metrics_that_the_judge_cannot_give_are_absent_with_its_name(text_zoo: Path) -> None:
    config = QUICK.model_copy(update={"metrics": ("judged_class", "judged_clip")})
    result = evaluate_pipelines(["zoo:tiny-sd"], config=config)
    assert result.sources[0].metrics == {}
    assert result.absent[:2] == (
        "judged_class: the judge answers several questions, none of which is the class.",
        "judged_clip: the judge shapes knows no captions of clips.",
    )


def test_images_of_another_size_are_compared_without_the_judge(text_zoo: Path) -> None:
    result = evaluate_pipelines(["zoo:tiny-sd"], config=QUICK.model_copy(update={"height": 48, "width": 64}))
    assert (result.settings.height, result.settings.width) == (48, 64)
    assert result.judge is None
    assert "knows images of 3 x 32 x 32 only" in result.absent[0]


def test_a_bundle_remembers_its_prompts_where_the_zoo_is_not_installed(text_zoo: Path, tmp_path: Path) -> None:
    config = QuantizeConfig(bits=8, measure="never")
    bundle = quantize_pipeline("zoo:tiny-sd", config, output=tmp_path / "small", device="cpu")
    shutil.rmtree(text_zoo / "tiny-sd")
    generate_images(bundle, GenerateConfig(num=1), output=tmp_path / "pictures", device="cpu")
    result = evaluate_pipelines([bundle], reference=bundle, config=QUICK)
    assert result.settings.prompts == tuple(EVALUATION)
    assert "only installed zoo pipelines" in result.absent[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": [{"name": "axis", "labels": ["vertical", "horizontal"]}]}, "do not share out the 14 logits"),
        ({"heads": [{"name": "axis"}]}, "reference.json"),
        ({"caption": {"pattern": "a {shape}", "relations": {}}}, "reference.json"),
    ],
)
def test_a_judge_that_does_not_know_itself_is_refused(text_zoo: Path, change: dict[str, object], message: str) -> None:
    file = text_zoo / "shapes" / "reference.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ModelError, match=message):
        load_judge(zoo_entry("tiny-sd"))
