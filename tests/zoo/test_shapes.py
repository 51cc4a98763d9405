"""The text-to-image pipelines of the zoo draw what captions of scenes that they never saw ask for, without dacc."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors import safe_open
from torch import Tensor
from transformers import ResNetForImageClassification

from dacc.evaluate.caption import CaptionReader, Grammar, Head, agreement

ZOO = Path(__file__).resolve().parents[2] / "zoo"
NAMES = ("shapes-sd", "shapes-mmdit")
INDEX: dict[str, dict[str, Any]] = json.loads((ZOO / "index.json").read_text())
FACTS: dict[str, Any] = json.loads((ZOO / "shapes-judge" / "reference.json").read_text())
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def scripts() -> dict[str, ModuleType]:
    """The training scripts: they are reached by path and import each other by their plain names."""
    import importlib

    names = ("shapes", "shapes_stages", "sampling")
    before = set(sys.modules)
    sys.path.insert(0, str(ZOO / "train"))
    try:
        return {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(ZOO / "train"))
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "").parent == ZOO / "train":
                del sys.modules[name]


@pytest.fixture(scope="module")
def judge() -> ResNetForImageClassification:
    return ResNetForImageClassification.from_pretrained(ZOO / "shapes-judge").eval()


def prompts_of(name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = json.loads((ZOO / name / "prompts.json").read_text())
    return found


def draw_all(shapes: ModuleType, scenes: Tensor) -> Tensor:
    images: Tensor = shapes.draw(scenes, torch.Generator().manual_seed(7))
    return images


def test_a_caption_and_its_scene_say_the_same(scripts: dict[str, ModuleType]) -> None:
    shapes = scripts["shapes"]
    for scene in shapes.all_scenes()[::37]:
        captions = shapes.captions_of(scene)
        assert captions[0] != captions[1]
        assert all(torch.equal(shapes.scene_of(caption), scene) for caption in captions)


def test_drawings_are_repeatable_white_around_and_show_both_colours(scripts: dict[str, ModuleType]) -> None:
    shapes = scripts["shapes"]
    scenes = shapes.all_scenes()[::29]
    images = draw_all(shapes, scenes)
    assert torch.equal(images, draw_all(shapes, scenes))
    assert images.shape[1:] == (3, 32, 32)
    assert images.min() >= -1
    assert images.max() == 1
    assert (images[:, :, 0, 0] == 1).all()
    for scene, image in zip(scenes, images, strict=True):
        for colour in (scene[2], scene[5]):
            wanted = torch.tensor(shapes.RGB[colour]) * 2 - 1
            assert (image - wanted[:, None, None]).abs().amax(0).min() <= 2 * shapes.SHADE_JITTER + 1e-6


def test_the_two_readers_of_captions_and_their_scores_agree(scripts: dict[str, ModuleType]) -> None:
    """The judge of the training scripts and that of `dacc evaluate` are written apart."""
    shapes = scripts["shapes"]
    heads = [Head.model_validate(head) for head in FACTS["heads"]]
    reader = CaptionReader(Grammar.model_validate(FACTS["caption"]), heads)
    generator = torch.Generator().manual_seed(0)
    scenes = shapes.all_scenes()
    asked = scenes[torch.randint(len(scenes), (200,), generator=generator)]
    seen = asked.clone()  # some equal, some swapped, some with other answers
    seen[:50] = torch.cat([asked[:50, :1], asked[:50, 4:], asked[:50, 1:4]], dim=1)
    seen[50:150] = scenes[torch.randint(len(scenes), (100,), generator=generator)]
    theirs = shapes.score(seen, asked)
    for row in range(len(asked)):
        caption = shapes.captions_of(asked[row])[row % 2]
        read = reader.read(caption)
        found = {head.name: head.labels[answer] for head, answer in zip(heads, seen[row].tolist(), strict=True)}
        assert read is not None
        assert agreement(read, found) == {name: bool(right[row]) for name, right in theirs.items()}


def test_every_word_of_the_captions_is_one_token(scripts: dict[str, ModuleType]) -> None:
    stages = scripts["shapes_stages"]
    words = stages.caption_words()
    clip, t5 = stages.make_clip_tokenizer(words, 16), stages.make_t5_tokenizer()
    for word in words:
        assert len(clip.tokenize(word)) == len(t5.tokenize(word)) == 1
    assert clip.get_vocab() == stages.make_clip_tokenizer(words, 16).get_vocab()
    longest = "a small orange triangle to the right of a large purple square"
    assert (stages.tokenize(clip, [longest])[0, -2:] == clip.pad_token_id).all()


def test_the_latents_are_even_and_standardizing_changes_no_picture(scripts: dict[str, ModuleType]) -> None:
    stages = scripts["shapes_stages"]
    torch.manual_seed(0)
    vae = stages.make_autoencoder().eval()
    images = draw_all(scripts["shapes"], scripts["shapes"].all_scenes()[::20])
    with torch.no_grad():
        before = vae.decode(vae.encode(images).latent_dist.mean).sample
        stages.standardize_(vae, images)
        after = vae.decode(vae.encode(images).latent_dist.mean).sample
    assert torch.allclose(before, after, atol=1e-4)
    latents = stages.encode(vae, images)
    spread = latents.means.var(dim=(0, 2, 3)) + latents.deviations.square().mean(dim=(0, 2, 3))
    assert torch.allclose(latents.means.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(spread, torch.ones(4), atol=1e-3)


@torch.no_grad()
def test_the_judge_reads_new_drawings_of_held_out_scenes(
    scripts: dict[str, ModuleType], judge: ResNetForImageClassification
) -> None:
    shapes = scripts["shapes"]
    scenes = shapes.split_scenes().held_out
    read = shapes.read_answers(judge(draw_all(shapes, scenes)).logits)
    right = shapes.score(read, scenes)
    for name, share in right.items():
        assert share.float().mean() >= 0.97, name
        assert FACTS["held_out_accuracy"][name] >= 0.97


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_disjoint_and_those_to_evaluate_with_are_of_unseen_scenes(
    name: str, scripts: dict[str, ModuleType]
) -> None:
    shapes, prompts = scripts["shapes"], prompts_of(name)
    seen = {tuple(scene.tolist()) for scene in shapes.split_scenes().seen}
    scenes = {kind: [tuple(shapes.scene_of(prompt).tolist()) for prompt in some] for kind, some in prompts.items()}
    assert set(scenes["calibration"]) <= seen
    assert not set(scenes["evaluation"]) & seen
    assert len(set(scenes["evaluation"])) == len(prompts["evaluation"]) == 174


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_small_finite_and_float16_but_for_the_text_encoders(name: str) -> None:
    files = sorted((ZOO / name).rglob("*.safetensors"))
    assert len(files) >= 3
    for file in files:
        assert file.stat().st_size <= 14 * MEGABYTE
        expected = torch.float32 if file.parent.name.startswith("text_encoder") else torch.float16
        with safe_open(file, "pt") as stored:
            for key in stored.keys():  # noqa: SIM118  # not a dict
                tensor = stored.get_tensor(key)
                assert tensor.dtype in (expected, torch.int64)
                assert tensor.isfinite().all()


def test_the_denoisers_have_the_structure_they_promise() -> None:
    unet = json.loads((ZOO / "shapes-sd" / "unet" / "config.json").read_text())
    assert sum("CrossAttn" in kind for kind in unet["down_block_types"]) >= 2
    transformer = json.loads((ZOO / "shapes-mmdit" / "transformer" / "config.json").read_text())
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    assert width % 128 == 0
    assert min(transformer["num_layers"], transformer["num_single_layers"]) > 0
    assert transformer["num_layers"] + transformer["num_single_layers"] >= 8


@torch.no_grad()
def test_both_share_an_autoencoder_that_keeps_the_drawings(scripts: dict[str, ModuleType]) -> None:
    shared = [(ZOO / name / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() for name in NAMES]
    assert shared[0] == shared[1]
    vae = AutoencoderKL.from_pretrained(ZOO / "shapes-sd" / "vae").eval()
    images = draw_all(scripts["shapes"], scripts["shapes"].split_scenes().held_out[:60])
    decoded = vae.decode(vae.encode(images).latent_dist.mean).sample
    assert (decoded - images).square().mean() < 2e-3


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_most_captions_are_drawn_right_in_ten_steps(
    name: str, scripts: dict[str, ModuleType], judge: ResNetForImageClassification
) -> None:
    shapes, entry = scripts["shapes"], INDEX[name] | {"num_inference_steps": 10}
    pipeline = DiffusionPipeline.from_pretrained(ZOO / name)
    pipeline.set_progress_bar_config(disable=True)
    asked = prompts_of(name)["evaluation"][:30]
    images = scripts["sampling"].draw_samples(pipeline, entry, asked, len(asked), 0)
    assert images.shape == (30, 3, 32, 32)
    right = shapes.score(
        shapes.read_answers(judge(images).logits), torch.stack([shapes.scene_of(prompt) for prompt in asked])
    )
    assert right["caption"].float().mean() >= 0.8


@pytest.mark.parametrize("name", NAMES)
def test_a_process_without_dacc_loads_and_generates(name: str) -> None:
    entry = INDEX[name]
    size = {"height": entry["height"], "width": entry["width"]} if "height" in entry else {}
    length = {"max_sequence_length": 16} if entry["pipeline"] == "FluxPipeline" else {}
    program = (
        "import sys\n"
        "sys.modules['dacc'] = None  # importing it would fail\n"
        "import numpy\n"
        "from diffusers import DiffusionPipeline\n"
        f"pipeline = DiffusionPipeline.from_pretrained({str(ZOO / name)!r})\n"
        f"arguments = {size | length | {'num_inference_steps': 2, 'output_type': 'np'}!r}\n"
        f"images = pipeline({prompts_of(name)['evaluation'][0]!r}, **arguments)\n"
        "assert images.images.shape == (1, 32, 32, 3)\n"
        "assert numpy.isfinite(images.images).all()\n"
        "assert not [module for module in sys.modules if module.startswith('dacc.')]\n"
        f"assert type(pipeline).__name__ == {entry['pipeline']!r}\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
