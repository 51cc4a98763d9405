"""A text-to-video pipeline from the zoo through quantize, calibrate, search-cache, generate and evaluate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import ResNetConfig, ResNetForImageClassification

import dacc
from dacc.core.errors import DaccError
from dacc.core.zoo import zoo_entry
from dacc.evaluate.api import evaluate_pipelines
from dacc.evaluate.config import EvaluateConfig
from dacc.evaluate.generate import GenerateConfig, generate_images
from dacc.evaluate.judge import load_judge
from dacc.evaluate.report import evaluation_rows, remarks
from dacc.runtime.request import RunRequest
from dacc.runtime.trajectory import capture_calls

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inside diffusers

HEADS = [
    {"name": "digit", "labels": ["red", "blue"]},
    {"name": "direction", "labels": ["above", "below", "still"]},
]
QUICK = EvaluateConfig(num=4, speed=False, memory=False, device="cpu")
CHECKED = {"digit_accuracy", "motion_accuracy", "caption_accuracy", "frechet_video"}


@pytest.fixture
def video_zoo(tmp_path: Path, video_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Zoo folder with zoo:tiny-video, clips of three frames, and a tiny random judge of clips."""
    zoo = tmp_path / "video-zoo"
    shutil.copytree(video_folder, zoo / "tiny-video")
    prompts = {"calibration": ["to the red above"], "evaluation": ["red above", "blue below"]}
    (zoo / "tiny-video" / "prompts.json").write_text(json.dumps(prompts))
    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=6, embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=5
    )
    ResNetForImageClassification(config).save_pretrained(zoo / "judge")
    save_file({"mean": torch.zeros(16), "covariance": torch.eye(16)}, zoo / "judge" / "reference.safetensors")
    facts = {
        "input_size": [3, 3, 32, 32],
        "value_range": [-1, 1],
        "fid_between_halves": 1.5,
        "heads": HEADS,
        "captions": ["{digit} {direction}", "to the {digit} {direction}"],
    }
    (zoo / "judge" / "reference.json").write_text(json.dumps(facts))
    index = {
        "tiny-video": {
            "pipeline": "AnimateDiffPipeline",
            "description": "",
            "num_inference_steps": 3,
            "guidance_scale": 2.0,
            "conditioning": "text",
            "num_frames": 3,
            "judge": "judge",
        }
    }
    (zoo / "index.json").write_text(json.dumps(index))
    monkeypatch.setenv("DACC_ZOO", str(zoo))
    return zoo


@pytest.mark.slow
def test_a_video_pipeline_goes_all_the_way(video_zoo: Path, tmp_path: Path) -> None:
    settings = dacc.CalibrateConfig(samples=2, timesteps=2, batch_size=2)
    inputs = dacc.calibrate_pipeline("zoo:tiny-video", settings, output=tmp_path / "inputs", device="cpu")
    call = next(iter(dacc.open_calibration(inputs)))
    assert call.args[0].shape == (4, 4, 3, 16, 16)  # two samples, with and without their prompt
    config = dacc.QuantizeConfig(bits=8, act_bits=8, method="gptq")
    bundle = dacc.quantize_pipeline("zoo:tiny-video", config, calib=inputs, output=tmp_path / "small", device="cpu")
    report = EvaluateConfig(**{**QUICK.model_dump(), "output": tmp_path / "report"})
    result = evaluate_pipelines([bundle], config=report)
    reference, small = result.sources
    assert set(reference.metrics) == CHECKED
    assert set(small.metrics) == {"relative_l2", "psnr", "ssim", *CHECKED}
    assert small.metrics["psnr"].value > 20
    assert {metric.count for metric in small.metrics.values()} == {4}
    assert (result.settings.num_frames, result.settings.prompts) == (3, ("red above", "blue below"))
    assert "Frechet video distance (judge)" in {row[0] for row in evaluation_rows(result)}
    assert any(line.startswith("The Frechet video distance uses judge: real clips") for line in remarks(result))
    with Image.open(tmp_path / "report" / "samples.png") as picture:
        assert picture.height > 2 * 3 * 64


def test_clips_are_written_as_animated_pictures(video_zoo: Path, tmp_path: Path) -> None:
    folder = generate_images("zoo:tiny-video", GenerateConfig(num=2), output=tmp_path / "clips", device="cpu")
    assert sorted(file.name for file in folder.iterdir()) == ["0000.png", "0001.png"]
    with Image.open(folder / "0001.png") as clip:
        assert (clip.n_frames, clip.size, clip.mode) == (3, (32, 32), "RGB")
        frames = []
        for number in range(3):
            clip.seek(number)
            frames.append(clip.tobytes())
    assert len(set(frames)) > 1
    longer = generate_images("zoo:tiny-video", GenerateConfig(num=1, num_frames=5), output=tmp_path / "5", device="cpu")
    with Image.open(longer / "0000.png") as clip:
        assert clip.n_frames == 5


def test_clips_of_another_length_are_sampled_without_the_judge(video_zoo: Path) -> None:
    result = evaluate_pipelines(["zoo:tiny-video"], config=QUICK.model_copy(update={"num_frames": 2}))
    assert result.sources[0].metrics == {}
    assert any("knows images of 3 x 3 x 32 x 32 only" in line for line in result.absent)


def test_a_cache_search_cuts_it_and_its_plan_runs(video_zoo: Path, tmp_path: Path) -> None:
    config = dacc.SearchCacheConfig(method="deepcache", macs_ratio=0.8, measure="never")
    found = dacc.search_cache("zoo:tiny-video", config, output=tmp_path / "cached", device="cpu")
    pipe = dacc.load(found, device="cpu")
    assert len(capture_calls(pipe, RunRequest(seeds=(1,), num_inference_steps=3, num_frames=3))) == 3


def test_a_judge_whose_captions_do_not_fit_its_heads_is_refused(video_zoo: Path) -> None:
    file = video_zoo / "judge" / "reference.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps({**facts, "captions": ["{digit} {speed}"]}))
    with pytest.raises(DaccError, match="needs"):
        load_judge(zoo_entry("tiny-video"))
