"""The text-to-video pipeline of the zoo shows the digit asked for, moving as asked, without dacc."""

import importlib
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNetMotionModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import ResNetForImageClassification

from dacc.core.zoo import read_index
from dacc.evaluate.judge import load_judge

ZOO = Path(__file__).resolve().parents[2] / "zoo"
FOLDER, JUDGE = ZOO / "digits-video", ZOO / "digits-video-judge"
ENTRY: dict[str, Any] = json.loads((ZOO / "index.json").read_text())["digits-video"]
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def scripts() -> dict[str, ModuleType]:
    """The training scripts: they are reached by path and import each other by their plain names."""
    names = ("clips", "data", "digits_video", "digits_video_judge", "sampling", "video_card")
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
    return ResNetForImageClassification.from_pretrained(JUDGE).eval()


@pytest.fixture(scope="module")
def clips(scripts: dict[str, ModuleType]) -> Any:
    """Clips of digits that no judge saw in training."""
    held_out = load_file(ZOO / "digits-judge" / "held_out.safetensors")
    digits = scripts["data"].Digits(held_out["images"].float() / 127.5 - 1, held_out["labels"])
    return scripts["clips"].draw_clips(digits, 300, torch.Generator().manual_seed(11))


def centres(frames: Tensor) -> Tensor:
    """Centre of the ink of every frame (N, F, 1, S, S): (N, F, 2), row and column."""
    ink = (frames[:, :, 0] + 1).clamp(min=0)
    places = torch.arange(ink.shape[-1]).float()
    total = ink.sum(dim=(2, 3))
    return torch.stack([(ink.sum(3) * places).sum(2) / total, (ink.sum(2) * places).sum(2) / total], dim=-1)


def test_digits_move_two_pixels_a_frame_as_their_direction_says_and_stay_inside(
    scripts: dict[str, ModuleType], clips: Any
) -> None:
    module = scripts["clips"]
    assert clips.frames.shape == (300, module.FRAMES, 1, module.FRAME_SIZE, module.FRAME_SIZE)
    steps = {"left": (0, -2), "right": (0, 2), "up": (-2, 0), "down": (2, 0)}
    wanted = torch.tensor([steps[module.DIRECTIONS[place]] for place in clips.directions.tolist()]).float()
    moved = centres(clips.frames).diff(dim=1)
    torch.testing.assert_close(moved, wanted[:, None].expand_as(moved), atol=1e-3, rtol=0)
    ink = (clips.frames + 1).sum(dim=(2, 3, 4))
    torch.testing.assert_close(ink, ink[:, :1].expand_as(ink), rtol=1e-4, atol=1e-2)


def test_prompts_name_every_digit_in_every_direction_once_in_words_of_their_own(
    scripts: dict[str, ModuleType],
) -> None:
    module = scripts["clips"]
    prompts = json.loads((FOLDER / "prompts.json").read_text())
    assert prompts == module.make_prompts()
    both = module.all_captions()
    assert sorted(prompts["evaluation"]) == sorted(first for first, _ in both)
    assert sorted(prompts["calibration"]) == sorted(second for _, second in both)
    assert len({first for first, _ in both}) == 40
    seen = [prompt.split() for prompt in prompts["evaluation"]]
    assert all(one[0] != two[0] and one[2] != two[2] for one, two in itertools.pairwise(seen))


def test_motion_modules_begin_as_the_identity(scripts: dict[str, ModuleType]) -> None:
    training = scripts["digits_video"]
    torch.manual_seed(0)
    frames = training.make_unet().eval()
    clips = training.add_motion(frames).eval()
    noisy, text, times = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 8, 64), torch.tensor([5, 900])
    states = text.repeat_interleave(3, dim=0)
    with torch.no_grad():
        found = clips(noisy, times, encoder_hidden_states=states).sample
        flat = noisy.transpose(1, 2).flatten(0, 1)
        alone = frames(flat, times.repeat_interleave(3), encoder_hidden_states=states).sample
    torch.testing.assert_close(found.transpose(1, 2).flatten(0, 1), alone, atol=1e-5, rtol=1e-5)


def test_the_judge_reads_clips_of_held_out_digits_as_well_as_stated(
    scripts: dict[str, ModuleType], judge: ResNetForImageClassification, clips: Any
) -> None:
    seen = scripts["digits_video_judge"].look(judge, clips.frames)
    stated = json.loads((JUDGE / "reference.json").read_text())["held_out_accuracy"]
    assert (seen.digits == clips.digits[:, None]).float().mean() == pytest.approx(stated["digit"], abs=0.02)
    assert (seen.directions == clips.directions).float().mean() == pytest.approx(stated["motion"], abs=0.02)
    assert min(stated.values()) >= 0.97


def test_the_judge_sees_motion_backwards_and_standing_still(
    scripts: dict[str, ModuleType], judge: ResNetForImageClassification, clips: Any
) -> None:
    look = scripts["digits_video_judge"].look
    turned = look(judge, clips.frames.flip(1))
    assert (turned.directions == clips.directions + 1 - 2 * (clips.directions % 2)).float().mean() > 0.97
    still = look(judge, clips.frames[:, 3:4].expand(-1, 8, -1, -1, -1))
    assert (still.directions == scripts["digits_video_judge"].STILL).float().mean() > 0.97


def test_broken_clips_lie_farther_from_the_reference_than_real_ones(
    scripts: dict[str, ModuleType], judge: ResNetForImageClassification, clips: Any
) -> None:
    statistics = load_file(JUDGE / "reference.safetensors")
    facts = json.loads((JUDGE / "reference.json").read_text())
    mean, covariance = statistics["mean"], statistics["covariance"]
    assert mean.shape == (facts["feature_dim"],)
    assert torch.linalg.eigvalsh(covariance.double()).min() > -1e-5
    card, module = scripts["video_card"], scripts["clips"]
    real = card.Gaussian(mean.double(), covariance.double())
    order = torch.tensor([0, 5, 2, 7, 4, 1, 6, 3])
    asked = [module.all_captions()[row][0] for row in clips.rows.tolist()]
    found = {
        name: card.measure_clips(judge, real, facts, frames, asked)["frechet_video"]
        for name, frames in (("real", clips.frames), ("shuffled", clips.frames[:, order]))
    }
    assert found["shuffled"] > 2 * found["real"]


def test_both_judges_of_clips_agree(scripts: dict[str, ModuleType], clips: Any) -> None:
    """That of the training scripts and that of `dacc evaluate` are written apart."""
    entry = next(entry for entry in read_index(ZOO) if entry.name == "digits-video")
    judge = load_judge(entry)
    assert judge is not None
    some = clips.frames[:40]
    theirs, ours = scripts["digits_video_judge"].look(judge.model, some), judge.look((some + 1) / 2)
    torch.testing.assert_close(ours.features, theirs.features, atol=1e-4, rtol=1e-4)
    assert torch.equal(ours.answers, torch.cat([theirs.digits, theirs.directions[:, None]], dim=1))


def test_weights_are_small_finite_and_float16_but_for_the_text_encoder() -> None:
    files = sorted(FOLDER.rglob("*.safetensors"))
    assert len(files) == 3
    assert sum(file.stat().st_size for folder in (FOLDER, JUDGE) for file in folder.rglob("*")) <= 14 * MEGABYTE
    for file in files:
        expected = torch.float32 if file.parent.name == "text_encoder" else torch.float16
        with safe_open(file, "pt") as stored:
            for key in stored.keys():  # noqa: SIM118  # not a dict
                tensor = stored.get_tensor(key)
                assert tensor.dtype in (expected, torch.int64)
                assert tensor.isfinite().all()


def test_the_denoiser_has_lists_of_layers_cross_attention_and_a_middle() -> None:
    config = UNetMotionModel.load_config(FOLDER / "unet")
    assert config["layers_per_block"] == [2, 2, 2]
    assert sum("CrossAttn" in kind for kind in config["down_block_types"]) == 2
    assert config["use_motion_mid_block"]


@torch.no_grad()
def test_the_autoencoder_keeps_the_frames(clips: Any) -> None:
    vae = AutoencoderKL.from_pretrained(FOLDER / "vae").eval()
    frames = clips.frames[:20].flatten(0, 1)
    assert (vae.decode(vae.encode(frames).latent_dist.mean).sample - frames).square().mean() < 5e-3


@pytest.mark.slow
@torch.no_grad()
def test_most_clips_show_what_was_asked_for_in_ten_steps(
    scripts: dict[str, ModuleType], judge: ResNetForImageClassification
) -> None:
    pipeline = DiffusionPipeline.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    asked = json.loads((FOLDER / "prompts.json").read_text())["evaluation"]
    made = scripts["sampling"].draw_samples(pipeline, ENTRY | {"num_inference_steps": 10}, asked, len(asked), 0)
    assert made.shape == (40, 8, 1, 32, 32)
    facts = json.loads((JUDGE / "reference.json").read_text())
    standard = torch.eye(facts["feature_dim"], dtype=torch.float64)
    real = scripts["video_card"].Gaussian(standard[0] * 0, standard)
    found = scripts["video_card"].measure_clips(judge, real, facts, made, asked)
    assert found["digit_accuracy"] >= 0.75
    assert found["motion_accuracy"] >= 0.9


def test_a_process_without_dacc_loads_and_generates() -> None:
    program = (
        "import sys\n"
        "sys.modules['dacc'] = None  # importing it would fail\n"
        "import numpy\n"
        "from diffusers import DiffusionPipeline\n"
        f"pipeline = DiffusionPipeline.from_pretrained({str(FOLDER)!r})\n"
        "clips = pipeline('seven moving left', num_frames=8, num_inference_steps=2, output_type='np').frames\n"
        "assert clips.shape == (1, 8, 32, 32, 1)\n"
        "assert numpy.isfinite(clips).all()\n"
        "assert not [module for module in sys.modules if module.startswith('dacc.')]\n"
        f"assert type(pipeline).__name__ == {ENTRY['pipeline']!r}\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
