"""The embedded pipelines are what their index promises, and load with plain diffusers and transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DiffusionPipeline, DiTPipeline
from safetensors.torch import load_file
from transformers import ResNetForImageClassification

from dacc.core.zoo import ZooEntry, read_index
from dacc.evaluate.caption import CaptionReader, Grammar, Head
from dacc.evaluate.clip import ClipReader

ZOO = Path(__file__).resolve().parents[2] / "zoo"
ALL: dict[str, dict[str, Any]] = json.loads((ZOO / "index.json").read_text())
INDEX = {name: facts for name, facts in ALL.items() if facts["conditioning"] != "text"}
PACKAGED = ("digits-unet", "digits-dit", "digits-judge")
DENOISERS = {
    "digits-unet": ZOO / "digits-unet" / "unet" / "diffusion_pytorch_model.safetensors",
    "digits-dit": ZOO / "digits-dit" / "transformer" / "diffusion_pytorch_model.safetensors",
}


@pytest.fixture(scope="module")
def pipelines() -> dict[str, DiffusionPipeline]:
    loaded = {name: DiffusionPipeline.from_pretrained(ZOO / name) for name in INDEX}
    for pipeline in loaded.values():
        pipeline.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def judge() -> ResNetForImageClassification:
    return ResNetForImageClassification.from_pretrained(ZOO / "digits-judge").eval()


def test_the_index_lists_exactly_the_pipelines_in_the_folder() -> None:
    here = {path.parent.name for path in ZOO.glob("*/model_index.json")}
    assert set(INDEX) == set(DENOISERS) <= here <= set(ALL)


@pytest.mark.parametrize("name", sorted(INDEX))
def test_an_index_entry_names_the_saved_class_and_an_existing_judge(name: str) -> None:
    saved = json.loads((ZOO / name / "model_index.json").read_text())
    assert saved["_class_name"] == INDEX[name]["pipeline"]
    assert (ZOO / INDEX[name]["judge"] / "reference.json").is_file()


@pytest.mark.parametrize("name", sorted(DENOISERS))
def test_denoiser_weights_are_float16_finite_and_small(name: str) -> None:
    assert DENOISERS[name].stat().st_size <= 10_000_000
    weights = load_file(DENOISERS[name])
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_all_weights_of_the_package_together_stay_under_22_megabytes() -> None:
    files = [path for name in PACKAGED for path in (ZOO / name).rglob("*.safetensors")]
    assert sum(path.stat().st_size for path in files) < 22_000_000


def test_the_unet_has_the_widths_attention_and_skips_it_promises(pipelines: dict[str, DiffusionPipeline]) -> None:
    config = pipelines["digits-unet"].unet.config
    assert isinstance(pipelines["digits-unet"], DDIMPipeline)
    assert (config.sample_size, config.in_channels, config.out_channels) == (16, 1, 1)
    assert tuple(config.block_out_channels) == (64, 128, 128)
    assert "AttnDownBlock2D" in config.down_block_types
    assert config.num_class_embeds is None


def test_the_transformer_has_eight_blocks_of_width_128(pipelines: dict[str, DiffusionPipeline]) -> None:
    pipeline = pipelines["digits-dit"]
    config = pipeline.transformer.config
    assert isinstance(pipeline, DiTPipeline)
    assert len(pipeline.transformer.transformer_blocks) >= 8
    assert config.num_attention_heads * config.attention_head_dim == 128
    assert (config.num_embeds_ada_norm, config.in_channels, config.out_channels) == (1000, 4, 4)


def test_labels_are_found_by_figure_and_by_word(pipelines: dict[str, DiffusionPipeline]) -> None:
    assert pipelines["digits-dit"].get_label_ids(["7", "three"]) == [7, 3]


def test_two_steps_give_finite_grey_pictures_in_float32(pipelines: dict[str, DiffusionPipeline]) -> None:
    for name, pipeline in pipelines.items():
        asked = {"class_labels": [3, 8]} if INDEX[name]["conditioning"] == "class" else {"batch_size": 2}
        generator = torch.Generator().manual_seed(0)
        images = pipeline(**asked, num_inference_steps=2, generator=generator, output_type="np").images
        assert images.shape == (2, 16, 16, 1)
        assert images.dtype == "float32"
        assert torch.from_numpy(images).isfinite().all()


@torch.no_grad()
def test_the_transformer_draws_the_digit_asked_for_in_ten_steps(
    pipelines: dict[str, DiffusionPipeline], judge: ResNetForImageClassification
) -> None:
    labels = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9] * 2
    pipeline, guidance_scale = pipelines["digits-dit"], INDEX["digits-dit"]["guidance_scale"]
    images = pipeline(
        class_labels=labels,
        guidance_scale=guidance_scale,
        num_inference_steps=10,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    logits = judge(torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1).logits
    assert (logits.argmax(dim=-1) == torch.tensor(labels)).float().mean() >= 0.8


@torch.no_grad()
def test_the_judge_reads_held_out_digits_as_well_as_stated(judge: ResNetForImageClassification) -> None:
    held_out = load_file(ZOO / "digits-judge" / "held_out.safetensors")
    logits = judge(held_out["images"].float() / 127.5 - 1).logits
    accuracy = float((logits.argmax(dim=-1) == held_out["labels"]).float().mean())
    stated = json.loads((ZOO / "digits-judge" / "reference.json").read_text())["held_out_accuracy"]
    assert accuracy >= 0.97
    assert accuracy == pytest.approx(stated, abs=0.01)


def test_reference_statistics_are_a_covariance_of_the_stated_width() -> None:
    statistics = load_file(ZOO / "digits-judge" / "reference.safetensors")
    facts = json.loads((ZOO / "digits-judge" / "reference.json").read_text())
    mean, covariance = statistics["mean"], statistics["covariance"]
    assert mean.shape == (facts["feature_dim"],)
    assert covariance.shape == (facts["feature_dim"], facts["feature_dim"])
    assert mean.dtype == covariance.dtype == torch.float32
    assert torch.equal(covariance, covariance.T)
    assert torch.linalg.eigvalsh(covariance.double()).min() > -1e-5


@torch.no_grad()
def test_held_out_digits_lie_near_the_reference_statistics(judge: ResNetForImageClassification) -> None:
    reference = load_file(ZOO / "digits-judge" / "reference.safetensors")
    held_out = load_file(ZOO / "digits-judge" / "held_out.safetensors")
    features = judge.resnet(held_out["images"].float() / 127.5 - 1).pooler_output.flatten(1)
    spread = reference["covariance"].diagonal().sum().sqrt()
    assert (features.mean(dim=0) - reference["mean"]).norm() < 0.2 * spread


TEXT = [entry for entry in read_index(ZOO) if entry.conditioning == "text"]


@pytest.mark.parametrize("entry", TEXT, ids=lambda entry: entry.name)
def test_the_prompts_of_a_text_pipeline_are_captions_that_its_judge_can_read(entry: ZooEntry) -> None:
    if not entry.installed:
        pytest.skip(f"{entry.name} is not in this checkout")
    facts = json.loads((ZOO / entry.judge / "reference.json").read_text())
    heads = [Head.model_validate(head) for head in facts["heads"]]
    reader: CaptionReader | ClipReader
    if entry.num_frames:
        reader = ClipReader(facts["captions"], heads)
    else:
        reader = CaptionReader(Grammar.model_validate(facts["caption"]), heads)
    assert all(reader.read(prompt) for prompt in (*entry.calibration_prompts, *entry.evaluation_prompts))
    assert json.loads((entry.path / "model_index.json").read_text())["_class_name"] == entry.pipeline
