"""What to sample, and how a pipeline is told: every pipeline class has names of its own for the same wishes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import Field, model_validator

from ..core.config import Config
from ..core.errors import ConfigError, UnsupportedError
from ..core.pipeline import denoisers
from ..core.reporter import Reporter
from ..core.zoo import ZooEntry

DEFAULT_PROMPTS = (
    "a photograph of a red bicycle leaning against a brick wall",
    "a watercolor painting of a lighthouse at dusk",
    "a close-up portrait of an old fisherman, soft window light",
    "a bowl of fruit on a wooden table",
)
Parameters = Mapping[str, inspect.Parameter]


class RunRequest(Config):
    """What to sample. Labels and prompts are dealt to the samples in turn, again from the first when they run out."""

    seeds: tuple[int, ...] = Field(min_length=1)  # one per sample
    num_inference_steps: int = Field(default=10, ge=1)
    # classifier-free wherever the pipeline can do it, also where its own `guidance_scale` means something else;
    # the scale that enters the denoiser where that was distilled to take one; None: the pipeline's default
    guidance_scale: float | None = None
    class_labels: tuple[int, ...] | None = None  # None: 0, 1, 2, ... where the pipeline wants classes
    prompts: tuple[str, ...] | None = None  # None: a few neutral prompts where the pipeline wants one
    negative_prompt: str | None = None
    negative_prompts: tuple[str, ...] | None = None  # in its place: several, dealt in turn too
    height: int | None = Field(default=None, ge=1)  # pixels; None: the pipeline's default
    width: int | None = Field(default=None, ge=1)
    num_frames: int | None = Field(default=None, ge=1)  # of a clip; None: the pipeline's default
    batch_size: int = Field(default=16, ge=1)  # samples per pipeline call; larger: faster, more memory

    @model_validator(mode="after")
    def _check(self) -> RunRequest:
        if () in (self.class_labels, self.prompts, self.negative_prompts):
            raise ValueError("class_labels, prompts and negative_prompts must not be empty")
        return self

    def with_zoo_defaults(self, entry: ZooEntry | None) -> RunRequest:
        """Guidance, classes, prompts, size and frames of a zoo pipeline where the request leaves them open.

        Raises:
            ModelError: the zoo pipeline's list of prompts is missing or damaged.
        """
        if entry is None:
            return self
        defaults = {
            "guidance_scale": self.guidance_scale if self.guidance_scale is not None else entry.guidance_scale,
            "class_labels": self.class_labels or entry.class_labels or None,
            "prompts": self.prompts or entry.evaluation_prompts or None,
            "height": self.height or entry.height,
            "width": self.width or entry.width,
            "num_frames": self.num_frames or entry.num_frames,
        }
        return self.model_copy(update=defaults)

    def batches(self) -> Iterator[range]:
        """Positions of the samples of each pipeline call."""
        for start in range(0, len(self.seeds), self.batch_size):
            yield range(start, min(start + self.batch_size, len(self.seeds)))


def tell_of_prompts(pipe: Any, request: RunRequest, reporter: Reporter) -> None:
    """A notice where a pipeline wants prompts and the request has none."""
    if request.prompts is None and "prompt" in call_arguments(pipe, request, [0]):
        reporter.notice(
            f"no prompts were given: {len(DEFAULT_PROMPTS)} neutral ones take turns; --prompts FILE gives more"
        )


def call_arguments(pipe: Any, request: RunRequest, positions: Sequence[int]) -> dict[str, Any]:
    """Arguments of the pipeline call, chosen by its signature.

    Raises:
        ConfigError: the request sets something that this pipeline does not have, or a class that it does not know.
        UnsupportedError: the pipeline needs inputs that a request cannot give.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    # CPU generators give the same noise whatever the device is
    generators = [torch.Generator("cpu").manual_seed(request.seeds[position]) for position in positions]
    arguments: dict[str, Any] = {
        "generator": generators,
        "num_inference_steps": request.num_inference_steps,
        "output_type": "pt",
    }
    if "eta" in parameters:
        arguments["eta"] = 0.0
    if "class_labels" in parameters:
        labels = _labels(pipe, request)
        arguments["class_labels"] = [labels[position % len(labels)] for position in positions]
    elif "prompt" in parameters:
        prompts = request.prompts or DEFAULT_PROMPTS
        arguments["prompt"] = [prompts[position % len(prompts)] for position in positions]
        arguments |= _text_length(pipe, parameters)
    else:
        arguments["batch_size"] = len(positions)
    arguments |= _guidance(pipe, parameters, request, positions)
    for name in ("height", "width", "num_frames"):
        if (value := getattr(request, name)) is not None:
            arguments[name] = value
    _check_arguments(type(pipe).__name__, parameters, arguments, request)
    return arguments


def _guidance(pipe: Any, parameters: Parameters, request: RunRequest, positions: Sequence[int]) -> dict[str, Any]:
    """Guidance of the request under the pipeline's own names.

    Flux and its kin call `guidance_scale` what enters a distilled denoiser. One that was not distilled ignores it, is
    guided by `true_cfg_scale`, and only when it is given a negative prompt.
    """
    name, scale, negative = "guidance_scale", request.guidance_scale, request.negative_prompts
    if request.negative_prompt is not None:
        negative = negative or (request.negative_prompt,)
    distilled = any(denoiser.config.get("guidance_embeds") for denoiser in _configured(pipe))
    if "true_cfg_scale" in parameters and not distilled and scale is not None:
        name, negative = "true_cfg_scale", negative or ("",)
    dealt = [negative[position % len(negative)] for position in positions] if negative else None
    found = {name: scale, "negative_prompt": dealt}
    return {name: value for name, value in found.items() if value is not None}


def _text_length(pipe: Any, parameters: Parameters) -> dict[str, int]:
    """`max_sequence_length`, where the pipeline would pad prompts to more positions than its tokenizer was made for.

    The defaults (512 of Flux) suit the one published model. The padding is not masked, so a smaller model that saw 16
    positions in training draws nonsense from 512. CLIP does not follow this argument: its length is fixed.
    """
    parameter = parameters.get("max_sequence_length")
    if parameter is None or not isinstance(parameter.default, int):
        return {}
    lengths = [
        getattr(tokenizer, "model_max_length", parameter.default)
        for name, tokenizer in pipe.components.items()
        if name.startswith("tokenizer") and tokenizer is not None
        if not type(pipe.components.get(name.replace("tokenizer", "text_encoder"))).__name__.startswith("CLIP")
    ]
    shortest = min(lengths, default=parameter.default)
    return {"max_sequence_length": shortest} if shortest < parameter.default else {}


def _labels(pipe: Any, request: RunRequest) -> tuple[int, ...]:
    """The classes that take turns: those asked for, else all.

    Raises:
        ConfigError: one that the pipeline does not have; its embedding would fail, or give that of another class.
    """
    known = _classes(pipe)
    if request.class_labels is None:
        return tuple(range(known or 1))
    for label in request.class_labels:
        if label < 0 or (known is not None and label >= known):
            classes = f"0 to {known - 1}" if known is not None else "0 and above"
            raise ConfigError(
                f"class {label}: {type(pipe).__name__} has classes {classes}.", mend="Choose one of these with --class."
            )
    return request.class_labels


def _classes(pipe: Any) -> int | None:
    """How many classes a class-conditional denoiser knows; None where its config does not tell."""
    for denoiser in _configured(pipe):
        for key in ("num_class_embeds", "num_embeds_ada_norm", "num_classes"):
            if denoiser.config.get(key):
                return int(denoiser.config[key])
    return None


def _configured(pipe: Any) -> list[Any]:
    """The denoisers; untyped, since torch knows nothing of their configs."""
    return list(denoisers(pipe).values())


def _check_arguments(name: str, parameters: Parameters, arguments: dict[str, Any], request: RunRequest) -> None:
    given = {"class_labels": request.class_labels, "prompt": request.prompts}
    unknown = [key for key in arguments if key not in parameters]
    unknown += [key for key, value in given.items() if value is not None and key not in parameters]
    if unknown:
        raise ConfigError(f"{name} does not take {', '.join(unknown)}.", mend="Leave them out.")
    empty, optional = inspect.Parameter.empty, (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    fillable = {"self", *arguments}
    needed = [
        key
        for key, value in parameters.items()
        if value.default is empty and value.kind not in optional and key not in fillable
    ]
    if needed:
        raise UnsupportedError(f"{name} needs {', '.join(needed)}.", "dacc runs pipelines that start from noise.")
