"""A request in the words of each pipeline class: guidance, prompts, sizes and text lengths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dacc.core.errors import ConfigError
from dacc.core.reporter import silent
from dacc.core.zoo import ZooEntry
from dacc.runtime.request import RunRequest, call_arguments
from dacc.runtime.trajectory import capture_calls, sample

TEXT_LENGTH = 16
SMALL = RunRequest(seeds=(1, 2), num_inference_steps=2, height=32, width=32)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inside diffusers


def test_a_flux_that_was_not_distilled_is_guided_by_two_evaluations_a_step(flux_pipeline: Callable[[], Any]) -> None:
    pipe = flux_pipeline()
    calls = capture_calls(pipe, SMALL.model_copy(update={"guidance_scale": 2.0}))
    assert [call.state.branch for call in calls if call.state] == ["cond", "uncond"] * 2
    texts = [call.kwargs["encoder_hidden_states"] for call in calls]  # (N, positions, C)
    assert {text.shape[1] for text in texts} == {TEXT_LENGTH}
    assert not torch.equal(texts[0], texts[1])
    assert len(capture_calls(pipe, SMALL)) == 2
    images = sample(pipe, SMALL).images
    assert images.shape == (2, 3, 32, 32)
    assert torch.isfinite(images).all()


def test_a_distilled_flux_takes_the_scale_as_an_input(flux_pipeline: Callable[[], Any]) -> None:
    pipe = flux_pipeline()
    pipe.transformer.register_to_config(guidance_embeds=True)
    arguments = call_arguments(pipe, SMALL.model_copy(update={"guidance_scale": 3.5}), range(2))
    assert arguments["guidance_scale"] == 3.5
    assert not {"true_cfg_scale", "negative_prompt"} & set(arguments)


def test_the_negative_prompt_is_passed_on(sd_pipeline: Callable[[], Any], flux_pipeline: Callable[[], Any]) -> None:
    request = SMALL.model_copy(update={"guidance_scale": 2.0, "negative_prompt": "red"})
    plain, flux = (call_arguments(make(), request, range(2)) for make in (sd_pipeline, flux_pipeline))
    assert plain["negative_prompt"] == flux["negative_prompt"] == ["red", "red"]
    assert (plain["guidance_scale"], flux["true_cfg_scale"]) == (2.0, 2.0)
    assert "true_cfg_scale" not in plain
    assert "guidance_scale" not in flux


def test_several_negative_prompts_take_turns_as_prompts_do(sd_pipeline: Callable[[], Any]) -> None:
    texts = {"negative_prompts": ("red", "blue"), "prompts": ("a", "b", "c")}
    request = SMALL.model_copy(update={"seeds": tuple(range(7)), **texts})
    arguments = call_arguments(sd_pipeline(), request, [2, 5, 6])
    assert (arguments["negative_prompt"], arguments["prompt"]) == (["red", "blue", "red"], ["c", "c", "a"])


def test_only_tokenizers_with_shorter_texts_change_the_length(flux_pipeline: Callable[[], Any]) -> None:
    pipe = flux_pipeline()
    pipe.tokenizer.model_max_length = 4  # CLIP's, which has nothing to do with it
    assert call_arguments(pipe, SMALL, range(2))["max_sequence_length"] == TEXT_LENGTH
    pipe.tokenizer_2.model_max_length = 10**30  # what a tokenizer says that knows no limit
    assert "max_sequence_length" not in call_arguments(pipe, SMALL, range(2))


def test_a_zoo_pipeline_fills_in_what_was_left_open(tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text('{"calibration": ["a dog"], "evaluation": ["a cat", "a bird"]}')
    entry = ZooEntry(
        name="x",
        path=tmp_path,
        pipeline="FluxPipeline",
        description="",
        num_inference_steps=20,
        guidance_scale=2.0,
        conditioning="text",
        height=32,
        width=48,
    )
    filled = RunRequest(seeds=(1,)).with_zoo_defaults(entry)
    assert (filled.prompts, filled.guidance_scale) == (("a cat", "a bird"), 2.0)
    assert (filled.height, filled.width, filled.class_labels) == (32, 48, None)
    given = {"prompts": ("a cow",), "guidance_scale": 1.0, "height": 64, "width": 64}
    kept = RunRequest(seeds=(1,), **given).with_zoo_defaults(entry)
    assert kept.model_dump(include=set(given)) == given


def test_a_size_that_the_pipeline_refuses_is_told_with_its_reason(sd_pipeline: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError, match="divisible by 8") as caught:
        sample(sd_pipeline(), SMALL.model_copy(update={"height": 33}))
    assert "--height" in caught.value.mend


def test_a_size_that_the_pipeline_rounds_is_a_notice(flux_pipeline: Callable[[], Any]) -> None:
    reporter = silent()
    images = sample(flux_pipeline(), SMALL.model_copy(update={"height": 34}), reporter=reporter).images
    assert images.shape[-2:] == (32, 32)
    assert "32 x 34 pixels were asked for" in reporter.notices[0]


@pytest.mark.parametrize("label", [4242, 1000, -1])
def test_a_class_that_the_pipeline_does_not_have_is_refused(dit_pipeline: Callable[[], Any], label: int) -> None:
    request = RunRequest(seeds=(1, 2), num_inference_steps=2, class_labels=(3, label))
    with pytest.raises(ConfigError, match=f"class {label}: DiTPipeline has classes 0 to 999") as caught:
        call_arguments(dit_pipeline(), request, range(2))
    assert "--class" in caught.value.mend
    last = request.model_copy(update={"class_labels": (0, 999)})
    assert call_arguments(dit_pipeline(), last, range(2))["class_labels"] == [0, 999]


def test_more_steps_than_the_scheduler_has_are_refused_with_the_most_that_it_takes(
    unet_pipeline: Callable[[], Any],
) -> None:
    with pytest.raises(ConfigError, match="DDIMScheduler refuses 5000 steps") as caught:
        sample(unet_pipeline(), RunRequest(seeds=(1,), num_inference_steps=5000))
    assert caught.value.mend == "Choose at most 1000 with --steps."


def test_other_failures_of_a_pipeline_stay_what_they_are(
    unet_pipeline: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = unet_pipeline()

    def fail(*_: object, **__: object) -> None:
        raise ValueError("must pass exactly one of `num_inference_steps` or `timesteps`")

    monkeypatch.setattr(pipe.scheduler, "set_timesteps", fail)
    with pytest.raises(ValueError, match="exactly one"):
        sample(pipe, RunRequest(seeds=(1,), num_inference_steps=2))
