"""A user's pictures take the place of what a run would draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy
import pytest
import torch
from PIL import Image

import dacc
from dacc import CalibrateConfig, calibrate_pipeline, open_calibration
from dacc.calibrate.picture_folder import read_folder
from dacc.calibrate.pictures import read_picture
from dacc.core.errors import ConfigError, ModelError, UnsupportedError
from dacc.core.reporter import silent
from dacc.core.seeds import named_seed, seed_stream
from dacc.prune.noise import noise_of as law_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inside diffusers
QUICK = {"samples": 3, "steps": 4, "timesteps": 4, "batch_size": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures of other sizes, with captions."""
    place = tmp_path / "pictures"
    place.mkdir()
    for number, size in enumerate([(40, 24), (17, 50)]):
        values = numpy.random.default_rng(number).integers(0, 256, (*size, 3), numpy.uint8)
        Image.fromarray(values).save(place / f"{number}.png")
    return place


def caption(folder: Path, *texts: str) -> None:
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text + "\n", encoding="utf-8")


def calls_of(source: Any, folder: Path, **fields: Any) -> list[Any]:
    config = CalibrateConfig(**{**QUICK, "images": folder, **fields})
    return list(open_calibration(calibrate_pipeline(source, config, device="cpu", overwrite=True)))


def noise_of(position: int, shape: tuple[int, ...]) -> torch.Tensor:
    seed = seed_stream("calibration", 0, QUICK["samples"])[position]
    return torch.randn(shape, generator=torch.Generator().manual_seed(named_seed(seed, "pictures")))


def assert_truth(source: Path, call: Any, entered: torch.Tensor, rtol: float = 1e-5) -> None:
    """The picture and the noise that a call names give what entered, in each guidance branch."""
    assert call.truth is not None
    assert call.state.sigma is not None
    mixed = law_of(source).mixed(*call.truth, call.state.sigma)
    for branch in entered.chunk(len(entered) // len(mixed)):
        torch.testing.assert_close(mixed, branch, rtol=rtol, atol=rtol)


def test_inputs_are_pictures_with_the_noise_of_each_call(unet_folder, folder):
    plain = calls_of(unet_folder, None)
    calls = calls_of(unet_folder, folder)
    assert [call.state.call for call in calls] == [call.state.call for call in plain]
    scheduler = diffusers.DDIMScheduler.from_pretrained(unet_folder / "scheduler")
    for place, positions in ((0, (0, 1)), (1, (2,))):
        batch = calls[4 * place : 4 * place + 4]
        assert torch.equal(batch[0].args[0], plain[4 * place].args[0])  # pure noise, as ever
        assert batch[0].truth is None
        for call in batch[1:]:
            assert_truth(unet_folder, call, call.args[0])
            for row, position in enumerate(positions):
                clean = read_picture(folder / f"{position % 2}.png", 16, 16, gray=True)[None]
                level = scheduler.alphas_cumprod[int(call.state.timestep)]
                wanted = level.sqrt() * clean + (1 - level).sqrt() * noise_of(position, clean.shape)
                torch.testing.assert_close(call.args[0][row : row + 1], wanted)


@pytest.mark.parametrize(("samples", "told"), [(2, False), (3, True)])
def test_pictures_that_several_samples_share_are_a_notice(unet_folder, folder, samples, told):
    config = CalibrateConfig(**{**QUICK, "images": folder, "samples": samples})
    reporter = silent()
    calibrate_pipeline(unet_folder, config, device="cpu", overwrite=True, reporter=reporter)
    assert any("2 pictures are shared by 3 samples" in text for text in reporter.notices) == told


def test_latents_are_those_of_the_vae_and_captions_are_prompts(sd_folder, folder):
    caption(folder, "one two", "three")
    config = CalibrateConfig(**QUICK, images=folder, guidance_scale=2.0)
    found = open_calibration(calibrate_pipeline(sd_folder, config, output="set", device="cpu"))
    assert [sample.prompt for sample in found.record.samples] == ["one two", "three", "one two"]
    assert found.record.recipe["images"]["count"] == 2
    pipe: Any = dacc.load(sd_folder, device="cpu")
    calls = list(found)
    last = calls[3]
    pixels = read_picture(folder / "0.png", 32, 32, gray=False)[None]
    with torch.no_grad():
        clean = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    level = pipe.scheduler.alphas_cumprod[int(last.state.timestep)]
    wanted = level.sqrt() * clean + (1 - level).sqrt() * noise_of(0, clean.shape)
    entered = last.args[0]
    assert len(entered) == 4  # both guidance branches of two samples
    assert_truth(sd_folder, last, entered)
    for row in (0, 2):
        torch.testing.assert_close(entered[row : row + 1], wanted)
    assert calls[0].kwargs["encoder_hidden_states"].shape[0] == 4


def test_a_pipeline_that_steps_from_both_guidance_branches_gets_every_picture_twice(dit_folder, folder):
    call = calls_of(dit_folder, folder, guidance_scale=2.0, samples=2)[3]
    pipe: Any = dacc.load(dit_folder, device="cpu")
    size = 8 * 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    rows = []
    with torch.no_grad():
        for number in range(2):
            pixels = read_picture(folder / f"{number}.png", size, size, gray=pipe.vae.config.in_channels == 1)[None]
            rows.append(pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor)
    noise = torch.cat([noise_of(position, rows[0].shape) for position in range(2)])
    level = pipe.scheduler.alphas_cumprod[int(call.state.timestep)]
    wanted = level.sqrt() * torch.cat(rows) + (1 - level).sqrt() * noise
    assert_truth(dit_folder, call, call.args[0])
    torch.testing.assert_close(call.args[0], torch.cat([wanted, wanted]))


@pytest.mark.parametrize(
    "solver", ["EulerDiscreteScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"]
)
def test_every_solver_gets_the_level_of_its_next_call(sd_folder, folder, tmp_path, solver):
    """The noise that is left when the picture is taken off again has the deviation of the level."""
    other = tmp_path / solver
    pipe: Any = dacc.load(sd_folder, device="cpu")
    pipe.scheduler = getattr(diffusers, solver).from_config(pipe.scheduler.config)
    pipe.save_pretrained(other)
    caption(folder, "one", "two")
    calls = calls_of(other, folder, steps=5, timesteps=9, samples=2)
    scheduler = pipe.scheduler
    latents = []
    with torch.no_grad():
        for number in range(2):
            pixels = read_picture(folder / f"{number}.png", 32, 32, gray=False)[None]
            latents.append(pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor)
    noise = torch.cat([noise_of(position, latents[0].shape) for position in range(2)])
    for call in calls[1:]:
        level = scheduler.alphas_cumprod[round(call.state.timestep)]
        wanted = level.sqrt() * torch.cat(latents) + (1 - level).sqrt() * noise  # as it enters, scaled or not
        torch.testing.assert_close(call.args[0][:2], wanted, rtol=0.02, atol=0.02)
        assert_truth(other, call, call.args[0])


def test_flows_mix_pictures_and_noise_and_pack_them(flux_folder, folder):
    caption(folder, "one", "two")
    calls = calls_of(flux_folder, folder, height=32, width=32, samples=2)
    pipe: Any = dacc.load(flux_folder, device="cpu")
    vae, last = pipe.vae, calls[3]
    rows = []
    with torch.no_grad():
        for number in range(2):
            pixels = read_picture(folder / f"{number}.png", 32, 32, gray=False)[None]
            latents = vae.encode(pixels).latent_dist.mode()
            latents = (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
            rows.append(pipe._pack_latents(latents, *latents.shape))
    noise = torch.cat([noise_of(position, rows[0].shape) for position in range(2)])
    sigma = last.state.sigma
    assert_truth(flux_folder, last, last.kwargs["hidden_states"])
    torch.testing.assert_close(last.kwargs["hidden_states"], (1 - sigma) * torch.cat(rows) + sigma * noise)


def test_the_request_knows_the_pictures_and_not_where_they_lie(unet_folder, folder, tmp_path):
    def made(place: Path, output: str) -> Any:
        config = CalibrateConfig(**QUICK, images=place)
        return open_calibration(calibrate_pipeline(unet_folder, config, output=output, device="cpu")).record

    first = made(folder, "first")
    moved = folder.rename(tmp_path / "elsewhere")
    second = made(moved, "second")
    assert (second.request, second.id) == (first.request, first.id)
    Image.new("RGB", (9, 9)).save(moved / "1.png")
    assert made(moved, "third").request != first.request
    plain = CalibrateConfig(**QUICK)
    assert all(call.truth is None for call in calls_of(unet_folder, None))
    assert "images" not in plain.model_dump()


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (lambda place: place.rename(place.with_name("gone")), ModelError, "no folder"),
        (lambda place: [file.unlink() for file in place.glob("*.png")], ConfigError, "holds no pictures"),
        (lambda place: (place / "0.png").write_bytes(b"no"), ModelError, "0.png cannot be read"),
        (lambda place: (place / "1.txt").write_text("a"), ConfigError, "1 of 2 .*, 0.png for one"),
    ],
)
def test_what_is_no_folder_of_pictures_is_refused(unet_folder, folder, spoil, error, said):
    spoil(folder)
    with pytest.raises(error, match=said):
        calls_of(unet_folder, folder)


def test_captions_are_utf_8_with_or_without_a_mark(folder):
    caption(folder, "a caf\u00e9", "\ufeffa lake")
    assert read_folder(folder).captions == ("a caf\u00e9", "a lake")
    (folder / "1.txt").write_bytes("a caf\u00e9".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"1\.txt is not UTF-8 text") as refused:
        read_folder(folder)
    assert refused.value.mend


def test_captions_for_a_pipeline_without_prompts_are_refused(unet_folder, folder):
    caption(folder, "a", "b")
    with pytest.raises(UnsupportedError, match="have captions, and DDIMPipeline takes no prompt") as refused:
        calls_of(unet_folder, folder)
    assert "--inputs" in str(refused.value.mend)


def test_a_pipeline_of_clips_takes_no_pictures(video_folder, folder):
    with pytest.raises(UnsupportedError, match="AnimateDiffPipeline, which makes clips"):
        calls_of(video_folder, folder, num_frames=2)
